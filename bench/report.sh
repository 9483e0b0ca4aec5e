# shellcheck shell=bash disable=SC2034,SC2154 # sourced by run, whose variables these are
# The facts, the tables, bench.json and the pictures.

facts() {
  keep fact date "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  keep fact quick "${QUICK:-0}"
  keep fact cpus "$(docker info --format '{{.NCPU}}')"
  keep fact cpu "$(box load-backend sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p)"
  keep fact memoryMB "$(calc "$(docker info --format '{{.MemTotal}}') / 1048576" 0)"
  keep fact system "$(docker info --format '{{.OperatingSystem}}, Linux {{.KernelVersion}}, Docker {{.ServerVersion}}')"
  keep fact java "$(box web1 sed -n 's/^JAVA_VERSION="\(.*\)"/\1/p' java/release)"
  keep fact connections 64
  keep fact runs "$RUNS"
  keep fact secondsARun "$LONG"
}

table() {
  say ""
  grep '^row' "$DATA" | sort -s -t$'\t' -k2,2n | awk -F'\t' '
    function figure(value, unit,   text, point) {
      if (value == "") return ""
      text = unit == "/s" || unit == "" ? "%d" : value >= 100 ? "%.0f" : value >= 10 ? "%.1f" : "%.2f"
      text = sprintf(text, value + 0)
      point = index(text, "."); point = point ? point : length(text) + 1
      while ((point -= 3) > 1) text = substr(text, 1, point - 1) "," substr(text, point)
      return unit == "" ? text : unit == "/s" ? text "/s" : text " " unit
    }
    BEGIN { format = "%3s  %-44s %10s  %-22s %10s %6s %-9s %s\n"
            printf format, "", "", "measured", "compared to", "", "ratio", "wanted", "" }
    { printf format, $2, $3, figure($4, $5), $6, figure($7, $5), $8 == "" ? "" : sprintf("%.2f", $8),
        $10 == "" ? "" : ($9 == "least" ? ">= " : "<= ") ($8 == "" ? figure($10, $5) : $10),
        $11 == "yes" ? "ok" : $11 == "no" ? "MISSED" : "" }'
  say ""
  if quick; then say "One run of 1 s each without a warm-up: it shows that the bench works, not the speed."
  else say "Warmed up for $WARM_UP s. Medians of $RUNS runs of $LONG s, in turn with the figures for comparison; a"
       say "ratio is the median of the rounds' ratios. One client has $PAIRS runs of $PAGE s, pages $RUNS of $PAGE s,"
       say "the start $STARTS runs."; fi
}

cpu_table() {
  grep -q '^cpu' "$DATA" || return 0
  say ""
  say "Microseconds of CPU time a request:"
  awk -F'\t' '$1 == "cpu" { used[$2, $3, $4] += $5; requests[$2, $3, $4] += $6 }
    function one(way, kind, container) {
      if (!requests[way, kind, container]) return "-"
      return sprintf("%.1f", used[way, kind, container] / requests[way, kind, container])
    }
    END { format = "     %-37s %9s %9s %9s %9s\n"
          printf format, "", "service", "nginx", "redis", "postgres"
          split("direct front", ways, " "); split("visit post newest healthz", kinds, " ")
          for (w = 1; w <= 2; w++) for (k = 1; k <= 4; k++) if ((ways[w], kinds[k], "service") in used)
            printf format, kinds[k] (w == 1 ? ", one instance" : ", nginx and three instances"),
              one(ways[w], kinds[k], "service"), one(ways[w], kinds[k], "nginx"), one(ways[w], kinds[k], "redis"),
              one(ways[w], kinds[k], "postgres") }' "$DATA"
}

failures_table() {
  [ -s "$WORK/failures" ] || return 0
  say ""
  say "Requests that failed, with their log lines:"
  cat "$WORK/failures"
}

write_results() {
  local picture kind pictures=()
  mkdir -p "$OUT"; rm -f "$OUT"/*.svg
  box_in load-backend jq -Rn -f /bench/results.jq <"$DATA" >"$OUT/bench.json"
  for picture in throughput latency instances pages; do
    kind=${picture/throughput/row}
    [ "$picture" != throughput ] || grep -q "^row.[1-6]$(printf '\t')" "$DATA" || continue
    ! grep -q "^$kind" "$DATA" || pictures+=("$picture")
  done
  pictures "$DATA" "${pictures[@]}"
  say ""
  say "Written to $OUT: $(cd "$OUT" && echo ./*), after $((SECONDS - BEGAN)) s"
}
