# The tables of `make bench-peers`, in Markdown; with -v picture=1 what draw.gp draws: a line a framework.
# Each file has the lines of one framework and of Threefold, measured in turn: NAME, run's time, KIND, fields. A time
# can be in several files, with the same lines of Threefold: those count once.
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
  if ($1 == "threefold") { if (!($2 in first)) first[$2] = FILENAME } else of[$1] = FILENAME
  counts = $1 != "threefold" || first[$2] == FILENAME
  there[$1] = 1
}
$3 == "run" {
  at[FILENAME, $1, $5, ++rounds[FILENAME, $1, $5]] = $6
  if (counts) { add($1 " rate " $5, $6); add($1 " p99 " $5, $7) }
}
!counts { next }
$3 == "memory" {
  sum = $5 == 1 ? $6 : sum + $6
  most = $5 == 1 || $6 > most ? $6 : most
  if ($5 == 3) { add($1 " largest", most); add($1 " together", sum) }
}
$3 == "start" || $3 == "image" { add($1 " " $3, $4) }
$3 == "cpu" { used[$1, $5, $6] += $7; requests[$1, $5, $6] += $8 }
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
function ratio(name, what,   file, n, i, list) {
  file = of[name]
  list = "ratio " name " " what
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

function microseconds(name, what,   b, text) {
  for (b = 1; b <= boxes; b++)
    text = text (b > 1 ? " / " : "") \
      (requests[name, what, box[b]] ? sprintf("%.1f", used[name, what, box[b]] / requests[name, what, box[b]]) : "–")
  return text
}

END {
  if (picture) {
    for (i = 1; i <= known; i++) if (there[name = order[i]]) {
      line = label[name]
      for (k = 1; k <= kinds; k++) line = line FS median(name " rate " kind[k])
      print line
    }
    exit
  }
  print "Requests a second; in brackets, of Threefold's in the same rounds:"
  print ""
  print "| | GET / | POST | newest 20 | /healthz |"
  print "| --- | --- | --- | --- | --- |"
  for (i = 1; i <= known; i++) if (there[name = order[i]]) {
    line = "| " label[name]
    for (k = 1; k <= kinds; k++) line = line " | " thousands(median(name " rate " kind[k])) \
      (name == "threefold" ? "" : sprintf(" (%.2f)", ratio(name, kind[k])))
    print line " |"
  }
  print ""
  print "The slowest hundredth (p99), in milliseconds; memory, in MB, after that load; start, in seconds; image, in MB:"
  print ""
  print "| | GET / | POST | newest 20 | /healthz | largest of three | together | start to the first 200 | image |"
  print "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
  for (i = 1; i <= known; i++) if (there[name = order[i]]) {
    line = "| " label[name]
    for (k = 1; k <= kinds; k++) line = line " | " short(median(name " p99 " kind[k]))
    print line " | " thousands(median(name " largest")) " | " thousands(median(name " together")) " | " \
      short(median(name " start")) " | " thousands(median(name " image")) " |"
  }
  print ""
  print "Microseconds of processor a request: instances / nginx / Redis / PostgreSQL:"
  print ""
  print "| | GET / | POST | newest 20 | /healthz |"
  print "| --- | --- | --- | --- | --- |"
  for (i = 1; i <= known; i++) if (there[name = order[i]]) {
    line = "| " label[name]
    for (k = 1; k <= kinds; k++) line = line " | " microseconds(name, kind[k])
    print line " |"
  }
  print ""
  print "Measured " begin (day == begin ? "" : " to " day) ": medians of " fact["how"] ", 64 connections; " \
    fact["machine"] "." (failed ? " Requests that failed: " failed "." : "")
}
