# Draws a picture from the lines that `run` keeps, as SVG on standard output:
#   gnuplot -e "picture='throughput'; data='results.tsv'" draw.gp      (or latency, instances, pages, balancing, peers)
# No background and middling colours, so that they read on white and on black.
grey = '#737d89'
blue = '#3b82f6'
orange = '#e0762f'
green = '#2f9e5c'
set terminal svg size 760,400 font 'sans-serif,13' noenhanced
set datafile separator "\t"
set decimalsign locale 'C'
set format y "%'.0f"
set border 1 linecolor rgb grey
set grid ytics linecolor rgb grey linewidth 0.3
set tics textcolor rgb grey nomirror scale 0
set key textcolor rgb grey below
set title textcolor rgb grey
set xlabel textcolor rgb grey
set yrange [0:*]
set style fill solid noborder
set boxwidth 0.9

# The fields FROM of the lines of one kind whose first field is NAME.
lines(kind, name, from) = sprintf("< awk -F'\\t' -v OFS='\\t' '$1 == \"%s\" && $2 == \"%s\" { print %s }' %s", \
                                  kind, name, from, data)

if (picture eq 'throughput') {
  set title 'Requests a second beside the limit: 1 to 3 one instance, 4 to 6 nginx and three instances'
  set style data histograms
  set style histogram clustered gap 1
  rows = sprintf("< awk -F'\\t' -v OFS='\\t' '$1 == \"row\" && $2 <= 6 && $3 !~ /^ / " . \
                 "{ print $2 \": \" substr($3, 1, index($3, \",\") - 1), $4, $7 }' %s", data)
  plot rows using 2:xtic(1) title 'measured' linecolor rgb blue, '' using 3 title 'limit' linecolor rgb grey
}
if (picture eq 'latency') {
  set title 'Milliseconds by load; nginx and three instances, 64 connections, requests at random times'
  set xlabel '% of the top speed'
  set style data linespoints
  plot lines('latency', 'visit', '$3, $6') title 'GET /, p99' lc rgb blue pt 7, \
       lines('latency', 'post', '$3, $6') title 'POST, p99' lc rgb orange pt 7, \
       lines('latency', 'visit', '$3, $5') title 'GET /, p50' lc rgb blue pt 7 dt 2, \
       lines('latency', 'post', '$3, $5') title 'POST, p50' lc rgb orange pt 7 dt 2
}
if (picture eq 'instances') {
  set title 'Requests a second by number of instances, each with a small share of a CPU'
  set xlabel 'instances'
  set style data histograms
  set style histogram clustered gap 1
  plot lines('instances', 'visit', '$3, $4') using 2:xtic(1) title 'GET /' lc rgb blue, \
       lines('instances', 'post', '$3, $4') using 2 title 'POST' lc rgb orange
}
if (picture eq 'pages') {
  set title 'Milliseconds for a page by number of messages; one client'
  set xlabel 'messages'
  set logscale x
  set format x "%'.0f"
  set format y '%.2f'
  set style data linespoints
  plot lines('pages', 'newest', '$3, $4') title 'newest 20' lc rgb blue pt 7, \
       lines('pages', 'middle', '$3, $4') title '20 from the middle' lc rgb orange pt 7, \
       lines('pages', 'one', '$3, $4') title 'one by id' lc rgb green pt 7
}
if (picture eq 'balancing') {
  set style data histograms
  set style histogram clustered gap 1
  set xrange [-0.6:3.6]
  set multiplot layout 1,2
  set title 'Visits a second'
  plot lines('balancing', 'equal', '$3, $4') using 2:xtic(1) title 'three equal instances' lc rgb blue, \
       lines('balancing', 'slowed', '$3, $4') using 2 title 'one slowed to a tenth of a CPU' lc rgb orange
  set title '99th percentile of the response time in ms'
  plot lines('balancing', 'equal', '$3, $6') using 2:xtic(1) title 'three equal instances' lc rgb blue, \
       lines('balancing', 'slowed', '$3, $6') using 2 title 'one slowed to a tenth of a CPU' lc rgb orange
  unset multiplot
}
if (picture eq 'peers') {
  set title 'Requests a second, the same job; nginx and three instances of each, 64 connections'
  set style data histograms
  set style histogram clustered gap 1
  plot data using 2:xtic(1) title 'GET /' linecolor rgb blue, '' using 3 title 'POST' linecolor rgb orange, \
       '' using 4 title 'newest 20' linecolor rgb green, '' using 5 title '/healthz' linecolor rgb grey
}
