# The lines that `run` keeps, as bench.json.
def figure: if . == "" then null else (tonumber? // .) end;
def lines($kind): map(select(.[0] == $kind) | .[1:]);
def named($names): [., $names] | transpose | map({key: .[1], value: (.[0] // "" | figure)}) | from_entries;

[inputs | split("\t")] as $all | $all | {
  machine: (lines("fact") | map({key: .[0], value: (.[1] | figure)}) | from_entries),
  rows: (lines("row") | map(named(["row", "what", "measured", "unit", "comparedTo", "compared", "ratio",
                                   "relation", "wanted", "reached"]))),
  cpuMicrosPerRequest: (lines("cpu") | group_by([.[0], .[1], .[2]]) | map({way: .[0][0], request: .[0][1],
      container: .[0][2], micros: ((map(.[3] | tonumber) | add) / (map(.[4] | tonumber) | add) * 10 | round / 10)})),
  latencyByLoad: (lines("latency") | map(named(["request", "percentOfTop", "perSecond", "p50Millis", "p99Millis"]))),
  pageMillisByMessages: (lines("pages") | map(named(["page", "messages", "millis"]))),
  throughputByInstances: (lines("instances") | map(named(["request", "instances", "perSecond"]))),
  requestsThatFailed: (lines("failed") | map(named(["way", "request", "count"]))),
  runs: (lines("run") | map(named(["comparison", "measurement", "figure"])))
}
