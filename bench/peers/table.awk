# The tables of `make bench-peers`, in Markdown; with -v picture=1 what draw.gp draws: a line a framework.
# Each file has the lines of one framework and of Threefold, measured in turn: NAME, run's time, KIND, fields. A run can
# be in several files, with the same lines of Threefold: those count once. Threefold has a row for each run, above those
# that were measured with it: from one to the next the machine may have grown slower.
BEGIN {
  FS = "\t"
  kinds = split("visit post newest healthz", kind, " ")
  split("GET /|POST|newest 20|/healthz", title, "|")
  boxes = split("service nginx redis postgres", box, " ")
  known = split("threefold vertx fastify spring flask", order, " ")
  split("Threefold|Vert.x|Fastify|Spring Boot|Flask", called, "|")
  for (i = 1; i <= known; i++) label[order[i]] = called[i]
}

{
  if (!($1 in label)) { label[$1] = $1; order[++known] = $1 }
  if (!($2 in first)) { first[$2] = FILENAME; run[++runs] = $2 }
  if ($1 != "threefold") of[$1, $2] = FILENAME
  id = $1 SUBSEP $2
  there[id] = 1
}
$3 == "run" { at[FILENAME, $1, $5, ++rounds[FILENAME, $1, $5]] = $6 }
$1 == "threefold" && first[$2] != FILENAME { next }
$3 == "run" { add(id " rate " $5, $6); add(id " p99 " $5, $7) }
$3 == "memory" {
  sum = $5 == 1 ? $6 : sum + $6
  most = $5 == 1 || $6 > most ? $6 : most
  if ($5 == 3) { add(id " largest", most); add(id " together", sum) }
}
$3 == "start" || $3 == "image" { add(id " " $3, $4) }
$3 == "cpu" { used[id, $5, $6] += $7; requests[id, $5, $6] += $8 }
$3 == "failed" { failed += $6 }
$3 == "fact" { fact[$4] = $5; day = substr($2, 1, 10); if (begin == "" || day < begin) begin = day }

function add(list, value) { value_of[list, ++length_of[list]] = value + 0 }

function median(list,   n, i, j, v, sorted) {
  n = length_of[list]
  if (!n) return 0
  for (i = 1; i <= n; i++) {
    v = value_of[list, i]
    for (j = i - 1; j >= 1 && sorted[j] > v; j--) sorted[j + 1] = sorted[j]
    sorted[j + 1] = v
  }
  return (sorted[int((n + 1) / 2)] + sorted[int(n / 2) + 1]) / 2
}

# The median of the rounds' ratios to Threefold.
function ratio(name, when, what,   file, n, i, list) {
  file = of[name, when]
  list = "ratio " file " " what
  n = rounds[file, name, what]
  if (!length_of[list]) for (i = 1; i <= n; i++)
    if (at[file, "threefold", what, i]) add(list, at[file, name, what, i] / at[file, "threefold", what, i])
  return median(list)
}

function thousands(value,   text) {
  text = sprintf("%d", value + 0.5)
  return length(text) > 3 ? substr(text, 1, length(text) - 3) "," substr(text, length(text) - 2) : text
}

function short(value) { return sprintf(value >= 100 ? "%.0f" : value >= 10 ? "%.1f" : "%.2f", value) }

function microseconds(id, what,   b, text) {
  for (b = 1; b <= boxes; b++)
    text = text (b > 1 ? " / " : "") \
      (requests[id, what, box[b]] ? sprintf("%.1f", used[id, what, box[b]] / requests[id, what, box[b]]) : "–")
  return text
}

END {
  for (r = 1; r <= runs; r++) for (i = 1; i <= known; i++) if ((order[i], run[r]) in there) {
    name[++rows] = order[i]
    when[rows] = run[r]
    ids[rows] = order[i] SUBSEP run[r]
  }
  if (picture) {
    for (r = 1; r <= rows; r++) {
      line = label[name[r]]
      for (k = 1; k <= kinds; k++) line = line FS median(ids[r] " rate " kind[k])
      print line
    }
    exit
  }
  print "Requests a second; in brackets, of Threefold's in the same rounds:"
  print ""
  print "| | GET / | POST | newest 20 | /healthz |"
  print "| --- | --- | --- | --- | --- |"
  for (r = 1; r <= rows; r++) {
    line = "| " label[name[r]]
    for (k = 1; k <= kinds; k++) line = line " | " thousands(median(ids[r] " rate " kind[k])) \
      (name[r] == "threefold" ? "" : sprintf(" (%.2f)", ratio(name[r], when[r], kind[k])))
    print line " |"
  }
  print ""
  print "The slowest hundredth (p99), in milliseconds; memory, in MB, after that load; start, in seconds; image, in MB:"
  print ""
  print "| | GET / | POST | newest 20 | /healthz | largest of three | together | start to the first 200 | image |"
  print "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
  for (r = 1; r <= rows; r++) {
    line = "| " label[name[r]]
    for (k = 1; k <= kinds; k++) line = line " | " short(median(ids[r] " p99 " kind[k]))
    print line " | " thousands(median(ids[r] " largest")) " | " thousands(median(ids[r] " together")) " | " \
      short(median(ids[r] " start")) " | " thousands(median(ids[r] " image")) " |"
  }
  print ""
  print "Microseconds of CPU time a request: instances / nginx / Redis / PostgreSQL:"
  print ""
  print "| | GET / | POST | newest 20 | /healthz |"
  print "| --- | --- | --- | --- | --- |"
  for (r = 1; r <= rows; r++) {
    line = "| " label[name[r]]
    for (k = 1; k <= kinds; k++) line = line " | " microseconds(ids[r], kind[k])
    print line " |"
  }
  print ""
  print "Measured " begin (day == begin ? "" : " to " day) ": medians of " fact["how"] ", 64 connections; " \
    fact["machine"] "." (failed ? " Requests that failed: " failed "." : "")
}
