import java.io.BufferedInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.security.Security;
import java.time.Duration;
import java.util.ArrayList;
import java.util.EnumMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.locks.LockSupport;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * The viewers of tests/stack/failover and tests/stack/cluster: they stay, coming back with Last-Event-ID to whichever
 * instance nginx gives them, while others write and the stack breaks. At the end each of them has to have been told
 * every message that was acknowledged, in the order of the events' ids, none twice.
 *
 * <p>{@code java SseClients.java HOST PORT RATE VIEWERS} says "joined" when all view, and writes RATE messages a
 * second, if it can, until standard input ends or says a line; then it prints `name=value` words and, for each thing
 * that is wrong, a line. JDK 21, nothing else.
 *
 * <p>HOST may be several, joined by commas: the next one is tried when one ends or does not answer. Of two such lists
 * with a slash between, every second viewer and writer has the second: clients on two sides of a cut.
 *
 * <pre>
 *   returns       streams that began after a viewer's first one
 *   unanswered    sent again and again, and not acknowledged when all is well again
 *   missing       acknowledged, and not told to a viewer
 *   doubled       told to a viewer twice
 *   out-of-order  told after an event with a later place
 *   gaps          a viewer was told that it misses something
 *   odd           anything else that a stream should not have in it
 * </pre>
 */
public final class SseClients {
    private static final int WRITERS = 64;
    private static final int CONNECT_MILLIS = 2_000, SILENCE_MILLIS = 20_000, PATIENCE_SECONDS = 30;
    private static final Pattern ID = Pattern.compile("\"id\":([0-9]+)");

    private final List<String[]> sides;
    private final int port;
    private final HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1)
            .connectTimeout(Duration.ofMillis(CONNECT_MILLIS)).build();
    private final Set<Long> acknowledged = ConcurrentHashMap.newKeySet(); // ids
    private final AtomicLong turns = new AtomicLong();
    private final AtomicInteger refused = new AtomicInteger();
    private final List<Viewer> viewers = new ArrayList<>();
    private volatile boolean writing = true, viewing = true;

    private SseClients(String hosts, int port) {
        this.sides = Stream.of(hosts.split("/")).map(side -> side.split(",")).toList();
        this.port = port;
    }

    public static void main(String[] args) throws Exception {
        Security.setProperty("networkaddress.cache.ttl", "0");
        Security.setProperty("networkaddress.cache.negative.ttl", "0");
        new SseClients(args[0], Integer.parseInt(args[1])).run(Integer.parseInt(args[2]), Integer.parseInt(args[3]));
    }

    private void run(int rate, int count) throws Exception {
        for (int i = 0; i < count; i++) viewers.add(new Viewer(new Way(i)));
        for (Viewer viewer : viewers) viewer.start();
        for (Viewer viewer : viewers) while (!viewer.joined) LockSupport.parkNanos(10_000_000);
        System.out.println("joined");
        long began = System.nanoTime();
        List<Thread> writers = new ArrayList<>();
        for (int i = 0; i < WRITERS; i++) {
            Way way = new Way(i);
            writers.add(Thread.ofPlatform().start(() -> write(began, rate, way)));
        }
        System.in.read();
        writing = false;
        long giveUp = System.nanoTime() + PATIENCE_SECONDS * 1_000_000_000L;
        for (Thread writer : writers) writer.join(Duration.ofNanos(Math.max(1, giveUp - System.nanoTime())));
        long unanswered = writers.stream().filter(Thread::isAlive).count();
        double seconds = (System.nanoTime() - began) / 1e9;
        for (int i = 0; i < PATIENCE_SECONDS * 10 && viewers.stream().anyMatch(Viewer::misses); i++) Thread.sleep(100);
        viewing = false;
        report(seconds, unanswered);
        System.exit(0);
    }

    private void report(double seconds, long unanswered) {
        int returns = viewers.stream().mapToInt(viewer -> Math.max(0, viewer.streams - 1)).sum();
        long wrong = unanswered;
        StringBuilder counts = new StringBuilder();
        for (Wrong what : Wrong.values()) {
            long count = viewers.stream().mapToLong(viewer -> viewer.count(what)).sum();
            counts.append(' ').append(what.name().replace('_', '-')).append('=').append(count);
            wrong += count;
        }
        System.out.printf("acknowledged=%d rate=%.0f repeated=%d unanswered=%d viewers=%d returns=%d%s wrong=%d%n",
                acknowledged.size(), acknowledged.size() / seconds, refused.get(), unanswered, viewers.size(), returns,
                counts, wrong);
        viewers.stream().flatMap(viewer -> viewer.evidence().stream()).limit(20)
                .forEach(line -> System.out.println("- " + line));
    }

    private enum Wrong { missing, doubled, out_of_order, gaps, odd }

    /** The id of an event: two numbers, TX-ID. */
    private record Cursor(long tx, long id) {
        private static final Pattern FORM = Pattern.compile("([0-9]+)-([0-9]+)");

        /** @return null if it is none */
        static Cursor of(String text) {
            Matcher parts = FORM.matcher(text == null ? "" : text);
            return parts.matches() ? new Cursor(Long.parseLong(parts.group(1)), Long.parseLong(parts.group(2))) : null;
        }

        boolean isAfter(Cursor other) { return tx > other.tx || tx == other.tx && id > other.id; }
    }

    /** The hosts of somebody's side, in turns. */
    private final class Way {
        private final String[] hosts;
        private int turn;

        Way(int number) {
            hosts = sides.get(number % sides.size());
            turn = number / sides.size();
        }

        String host() { return hosts[turn % hosts.length]; }
        void next() { turn++; }
    }

    /** Each message under a key of its own, sent until it is acknowledged. */
    private void write(long began, int rate, Way way) {
        while (writing) {
            long turn = turns.getAndIncrement(), due = began + turn * 1_000_000_000L / rate;
            for (long now; (now = System.nanoTime()) < due; ) LockSupport.parkNanos(due - now);
            while (!sent(began, turn, way.host())) {
                refused.incrementAndGet();
                way.next();
                LockSupport.parkNanos(50_000_000);
            }
        }
    }

    private boolean sent(long began, long turn, String host) {
        HttpRequest request = HttpRequest.newBuilder(URI.create("http://" + host + ':' + port + "/api/messages"))
                .timeout(Duration.ofSeconds(10)).header("Content-Type", "application/json")
                .header("Idempotency-Key", "viewers-" + began + '-' + turn)
                .POST(HttpRequest.BodyPublishers.ofString(
                        "{\"author\":\"test-failover\",\"body\":\"for the viewers, " + turn + "\"}")).build();
        try {
            HttpResponse<String> answer = http.send(request, HttpResponse.BodyHandlers.ofString());
            Matcher id = ID.matcher(answer.body());
            if (answer.statusCode() / 100 != 2 || !id.find()) return false;
            acknowledged.add(Long.parseLong(id.group(1)));
            return true;
        } catch (IOException e) {
            return false;
        } catch (InterruptedException e) { throw new IllegalStateException(e); }
    }

    /** Somebody who stays: one stream after the other, each from where the last one ended. */
    private final class Viewer extends Thread {
        private final Set<Long> told = ConcurrentHashMap.newKeySet();
        private final Map<Wrong, Integer> wrong = new EnumMap<>(Wrong.class);
        private final List<String> evidence = new ArrayList<>();
        private Cursor last;
        private String lastId = "";
        private volatile boolean joined;
        private volatile int streams;
        private int left;                    // bytes of the chunk that is being read
        private final Way way;

        Viewer(Way way) { this.way = way; }

        @Override public void run() {
            for (; viewing; way.next()) {
                try (Socket socket = new Socket()) {
                    socket.connect(new InetSocketAddress(way.host(), port), CONNECT_MILLIS);
                    socket.setSoTimeout(SILENCE_MILLIS);
                    socket.getOutputStream().write(("GET /api/events HTTP/1.1\r\nHost: " + way.host() + "\r\n"
                            + (lastId.isEmpty() ? "" : "Last-Event-ID: " + lastId + "\r\n") + "\r\n").getBytes(UTF_8));
                    left = 0;
                    read(new BufferedInputStream(socket.getInputStream(), 64 * 1024));
                } catch (IOException e) { /* it comes again */
                } catch (RuntimeException e) {
                    if (viewing) wrong(Wrong.odd, "what came was no stream of events: " + e);
                }
                LockSupport.parkNanos(200_000_000);
            }
        }

        private void read(InputStream in) throws IOException {
            if (!line(in).contains(" 200 ")) return;
            while (!line(in).isEmpty()) { /* headers */ }
            streams++;
            String event = "message", id = null, data = null;
            for (String line; viewing; ) {
                line = line(new Chunked(in));
                joined = true;
                if (line.startsWith("event:")) event = line.substring(6).strip();
                else if (line.startsWith("id:")) id = line.substring(3).strip();
                else if (line.startsWith("data:")) data = line.substring(5).strip();
                else if (line.isEmpty()) {
                    if (data == null && id != null) lastId = id; // where it begins
                    if (data != null && (event.equals("message") || event.equals("gap"))) told(event, id, data);
                    event = "message";
                    id = data = null;
                }
            }
        }

        /** The bytes within the chunks of HTTP/1.1. */
        private final class Chunked extends InputStream {
            private final InputStream in;

            Chunked(InputStream in) { this.in = in; }

            @Override public int read() throws IOException {
                if (left == 0) {
                    String size = line(in);
                    left = Integer.parseInt(size.isEmpty() ? line(in) : size, 16);
                    if (left == 0) throw new IOException("the end");
                }
                left--;
                return in.read();
            }
        }

        private synchronized void told(String event, String id, String data) {
            Cursor cursor = Cursor.of(id);
            Matcher message = ID.matcher(data);
            if (event.equals("gap")) wrong(Wrong.gaps, "told of a gap: " + data);
            else if (cursor == null || !message.find())
                wrong(Wrong.odd, "a message with the id " + id + " and the data " + data);
            else {
                long number = Long.parseLong(message.group(1));
                if (last != null && !cursor.isAfter(last))
                    wrong(Wrong.out_of_order, id + " was told after " + lastId);
                if (!told.add(number)) wrong(Wrong.doubled, "message " + number + " was told twice");
                last = cursor;
                lastId = id;
            }
        }

        private synchronized void wrong(Wrong what, String line) {
            wrong.merge(what, 1, Integer::sum);
            if (evidence.size() < 10) evidence.add(line);
        }

        boolean misses() { return missing() > 0; }

        private long missing() {
            return acknowledged.stream().filter(message -> !told.contains(message)).count();
        }

        synchronized long count(Wrong what) { return what == Wrong.missing ? missing() : wrong.getOrDefault(what, 0); }

        synchronized List<String> evidence() {
            List<String> all = new ArrayList<>(evidence);
            if (misses()) all.add(missing() + " of " + acknowledged.size() + " acknowledged messages were never told");
            return all;
        }
    }

    private static String line(InputStream in) throws IOException {
        StringBuilder line = new StringBuilder();
        for (int c; (c = in.read()) != '\n'; ) {
            if (c < 0) throw new IOException("the end");
            if (c != '\r') line.append((char) c);
        }
        return line.toString();
    }
}
