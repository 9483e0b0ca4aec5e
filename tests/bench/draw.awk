# Draws a picture from the lines that `run` keeps: awk -f draw.awk -v picture=throughput|latency|instances|pages FILE
# No background and middling colours, so that they read on white and on black. Prints nothing where there are no figures.

BEGIN {
  FS = "\t"
  grey = "#737d89"; faint = "#7f8a9633"; colour[1] = "#3b82f6"; colour[2] = "#e0762f"; colour[3] = "#2f9e5c"
  title["visit"] = "GET /"; title["post"] = "POST"; title["newest"] = "newest 20"
  title["middle"] = "20 from the middle"; title["one"] = "one by id"
  width = 760; left = 64; right = 140; top = 64
}
$1 == "row" && $2 <= 6 { n++; what[n] = $3; measured[n] = $4; against[n] = $6; compared[n] = $7; ratio[n] = $8; wanted[n] = $10 }
$1 == "latency"   { point($2 " p99", $3, $6); point($2 " p50", $3, $5) }
$1 == "instances" { point($2, $3, $4) }
$1 == "pages"     { point($2, $3, $4) }
END {
  if (picture == "throughput" && n) throughput()
  if (picture == "latency"   && ("visit p99", 1) in value) curves("latency", "Latency by load, through nginx and three instances", \
    "milliseconds, 64 connections, requests at random times", "% of the top speed", "visit p99|post p99|visit p50|post p50")
  if (picture == "instances" && ("visit", 1) in value) columns()
  if (picture == "pages"     && ("newest", 1) in value) curves("pages", "Page time by number of messages", \
    "milliseconds, one client", "messages", "newest|middle|one")
}

# --- Figures of the kind that is drawn -------------------------------------------------------------------------------

function point(series, x, y) {
  if ($1 != picture) return
  if (!(x in place)) { place[x] = ++places; mark[places] = x }
  value[series, place[x]] = y
}
function highest(  key, most) { for (key in value) if (value[key] + 0 > most) most = value[key]; return most }

# A round number at or above a fifth of the highest: the step of the axis.
function step_for(most,   step) {
  step = 10 ^ int(log(most / 5) / log(10) + 100) / 10 ^ 100
  return step * (most / 5 <= step ? 1 : most / 5 <= 2 * step ? 2 : most / 5 <= 5 * step ? 5 : 10)
}
function plain(number,   text, at) {                                     # 1234567 as 1,234,567; 0.25 as it is
  text = sprintf(number >= 100 || number == int(number) ? "%d" : number >= 10 ? "%.1f" : "%.2f", number)
  at = index(text, "."); at = at ? at : length(text) + 1
  while ((at -= 3) > 1) text = substr(text, 1, at - 1) "," substr(text, at)
  return text
}

# --- Shapes ----------------------------------------------------------------------------------------------------------

function begin(height, heading, sub_heading) {
  printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" role=\"img\" aria-label=\"%s\"\n", \
    width, height, width, height, heading
  print " font-family=\"system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif\" font-size=\"13\">"
  text(16, 26, heading, "start", grey, "font-size=\"16\" font-weight=\"600\"")
  text(16, 46, sub_heading, "start", grey, "font-size=\"12\"")
}
function text(x, y, words, anchor, fill, more) {
  gsub(/&/, "\\&amp;", words); gsub(/</, "\\&lt;", words)
  printf "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" fill=\"%s\" %s>%s</text>\n", x, y, anchor, fill, more, words
}
function box(x, y, w, h, fill) {
  printf "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" rx=\"2\" fill=\"%s\"/>\n", x, y, w, h, fill
}
function line(x1, y1, x2, y2, stroke, more) {
  printf "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" %s/>\n", x1, y1, x2, y2, stroke, more
}
function y_axis(base, most, scale,   step, at) {
  step = step_for(most)
  for (at = 0; at <= most * 1.001; at += step) {
    line(left, base - at * scale, width - right, base - at * scale, faint, "")
    text(left - 8, base - at * scale + 4, plain(at), "end", grey, "font-size=\"12\"")
  }
}

# --- Pictures --------------------------------------------------------------------------------------------------------

# Each of the six beside its limit; a tick where the wanted ratio is.
function throughput(   i, y, most, scale, high, wish) {
  for (i = 1; i <= n; i++) {
    if (measured[i] + 0 > most) most = measured[i]
    if (compared[i] + 0 > most) most = compared[i]
    if (compared[i] * wanted[i] > most) most = compared[i] * wanted[i]
  }
  left = 16; right = 250; scale = (width - left - right) / most; high = 70
  begin(top + 14 + n * high + 24, "Throughput beside its limit", "requests a second, 64 connections, durable: fsync and AOF on")
  for (i = 1; i <= n; i++) {
    y = top + 14 + (i - 1) * high
    text(left, y, what[i], "start", grey, "font-weight=\"600\"")
    box(left, y + 7, measured[i] * scale, 18, colour[1])
    wish = compared[i] * wanted[i] * scale                               # a figure just short of it stands beyond it
    text(left + (wish > measured[i] * scale && wish < measured[i] * scale + 60 ? wish : measured[i] * scale) + 8, y + 21, plain(int(measured[i])), "start", colour[1], "font-weight=\"600\"")
    box(left, y + 28, compared[i] * scale, 12, grey)
    text(left + compared[i] * scale + 8, y + 38.5, plain(int(compared[i])) "  " against[i], "start", grey, "font-size=\"12\"")
    line(left + wish, y + 4, left + wish, y + 28, colour[2], "stroke-width=\"2\"")
    text(width - 16, y + 21, sprintf("%.2f ×", ratio[i]), "end", grey, "font-size=\"15\" font-weight=\"600\"")
  }
  y = top + 14 + n * high + 4
  line(left + 6, y - 9, left + 6, y + 5, colour[2], "stroke-width=\"2\"")
  text(left + 16, y + 3, "wanted", "start", grey, "font-size=\"12\"")
  print "</svg>"
}

# A line for each series, its name at its end. p50 is dashed.
function curves(kind, heading, sub_heading, below, list,   series, count, i, p, base, most, scale, x, dash, path, y, used, shade) {
  count = split(list, series, "|"); most = highest(); base = 330
  if (kind == "pages") most *= 1.15
  scale = (base - top - 14) / (most > 0 ? most : 1)
  begin(base + 52, heading, sub_heading)
  y_axis(base, most, scale)
  for (p = 1; p <= places; p++) text(across(p), base + 20, plain(mark[p]), "middle", grey, "font-size=\"12\"")
  text((left + width - right) / 2, base + 40, below, "middle", grey, "font-size=\"12\"")
  for (i = 1; i <= count; i++) {
    shade = colour[kind == "latency" ? (series[i] ~ /^visit/ ? 1 : 2) : i]
    dash = series[i] ~ /p50$/ ? "stroke-dasharray=\"5 4\"" : ""
    path = ""
    for (p = 1; p <= places; p++) path = path (p == 1 ? "M" : "L") sprintf("%.1f %.1f", across(p), base - value[series[i], p] * scale)
    printf "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2.5\" stroke-linejoin=\"round\" stroke-linecap=\"round\" %s/>\n", path, shade, dash
    for (p = 1; p <= places; p++)
      printf "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n", across(p), base - value[series[i], p] * scale, shade
    label_y[i] = base - value[series[i], places] * scale; label_fill[i] = shade; label[i] = name_of(series[i])
  }
  labels(count)
  print "</svg>"
}
function across(p,   share) {           # loads stand where they belong; messages, each ten times the last, evenly
  share = places == 1 ? 0.5 : picture == "latency" ? (mark[p] - mark[1]) / (mark[places] - mark[1]) : (p - 1) / (places - 1)
  return left + 24 + share * (width - right - left - 48)
}
function name_of(series,   words) {
  split(series, words, " ")
  return title[words[1]] (words[2] == "" ? "" : ", " words[2])
}

# The names at the lines' ends, from the lowest up, none nearer to the next than a line of text.
function labels(count,   i, j, k, next_y, done_) {
  next_y = 1e9
  for (i = 1; i <= count; i++) {
    j = 0
    for (k = 1; k <= count; k++) if (!(k in done_) && (!j || label_y[k] > label_y[j])) j = k
    done_[j] = 1
    if (label_y[j] > next_y - 17) label_y[j] = next_y - 17
    next_y = label_y[j]
    text(across(places) + 14, label_y[j] + 4, label[j], "start", label_fill[j], "font-weight=\"600\"")
  }
}

function columns(   p, i, base, most, scale, x, w, series) {
  split("visit|post", series, "|"); base = 330; most = highest(); scale = (base - top - 30) / most; w = 62
  begin(base + 52, "Throughput by number of instances", "requests a second through nginx, 64 connections, all on one machine")
  y_axis(base, most, scale)
  for (p = 1; p <= places; p++) {
    x = left + (p - 0.5) * (width - right - left) / places
    for (i = 1; i <= 2; i++) {
      box(x + (i == 1 ? -w - 3 : 3), base - value[series[i], p] * scale, w, value[series[i], p] * scale, colour[i])
      text(x + (i == 1 ? -w / 2 - 3 : w / 2 + 3), base - value[series[i], p] * scale - 6, plain(int(value[series[i], p])), "middle", colour[i], "font-weight=\"600\" font-size=\"12\"")
    }
    text(x, base + 20, plain(mark[p]), "middle", grey, "")
  }
  text((left + width - right) / 2, base + 40, "instances", "middle", grey, "font-size=\"12\"")
  for (i = 1; i <= 2; i++) {
    box(width - right + 24, top + 14 + i * 22, 12, 12, colour[i])
    text(width - right + 42, top + 25 + i * 22, title[series[i]], "start", grey, "")
  }
  print "</svg>"
}
