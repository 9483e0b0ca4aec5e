import java.io.BufferedInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.security.Security;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.locks.LockSupport;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * The viewers of tests/failover: they stay, coming back with Last-Event-ID to whichever instance nginx gives them,
 * while others write and the stack breaks. At the end each of them has to have been told every message that was
 * acknowledged, in the order of the events' ids, none twice.
 *
 * <p>{@code java Viewers.java HOST PORT RATE VIEWERS} writes RATE messages a second, if it can, until standard input
 * ends or says a line (`v1` at the end: some instances are of the first version); then it prints `name=value` words
 * and, for each thing that is wrong, a line. JDK 21, nothing else.
 */
public final class Viewers {
    private static final int WRITERS = 64, SILENCE_MILLIS = 20_000, PATIENCE_SECONDS = 30;
    private static final Pattern CURSOR = Pattern.compile("([0-9]+)-([0-9]+)"), ID = Pattern.compile("\"id\":([0-9]+)");

    private final String host;
    private final int port;
    private final boolean firstVersion; // its ids are plain numbers, and it may tell a message twice
    private final HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    private final Set<Long> acknowledged = ConcurrentHashMap.newKeySet();
    private final AtomicInteger refused = new AtomicInteger();
    private final List<Viewer> viewers = new ArrayList<>();
    private volatile boolean writing = true, viewing = true;

    private Viewers(String host, int port, boolean firstVersion) {
        this.host = host;
        this.port = port;
        this.firstVersion = firstVersion;
    }

    public static void main(String[] args) throws Exception {
        Security.setProperty("networkaddress.cache.ttl", "0");
        Security.setProperty("networkaddress.cache.negative.ttl", "0");
        new Viewers(args[0], Integer.parseInt(args[1]), List.of(args).contains("v1"))
                .run(Integer.parseInt(args[2]), Integer.parseInt(args[3]));
    }

    private void run(int rate, int count) throws Exception {
        for (int i = 0; i < count; i++) viewers.add(new Viewer());
        for (Viewer viewer : viewers) viewer.start();
        for (Viewer viewer : viewers) while (!viewer.joined) LockSupport.parkNanos(10_000_000);
        long began = System.nanoTime();
        AtomicLong turns = new AtomicLong();
        List<Thread> writers = new ArrayList<>();
        for (int i = 0; i < WRITERS; i++) writers.add(Thread.ofPlatform().start(() -> write(began, rate, turns)));
        System.in.read();
        writing = false;
        for (Thread writer : writers) writer.join();
        double seconds = (System.nanoTime() - began) / 1e9;
        for (int i = 0; i < PATIENCE_SECONDS * 10 && viewers.stream().anyMatch(Viewer::misses); i++) Thread.sleep(100);
        viewing = false;
        report(seconds);
        System.exit(0);
    }

    private void report(double seconds) {
        List<String> wrong = new ArrayList<>();
        for (Viewer viewer : viewers) wrong.addAll(viewer.wrong());
        int returns = viewers.stream().mapToInt(viewer -> viewer.returns).sum();
        System.out.printf("acknowledged=%d rate=%.0f repeated=%d viewers=%d returns=%d wrong=%d%n", acknowledged.size(),
                acknowledged.size() / seconds, refused.get(), viewers.size(), returns, wrong.size());
        wrong.stream().limit(20).forEach(line -> System.out.println("- " + line));
    }

    /** Each message under a key of its own, sent until it is acknowledged. */
    private void write(long began, int rate, AtomicLong turns) {
        while (writing) {
            long turn = turns.getAndIncrement(), due = began + turn * 1_000_000_000L / rate;
            for (long now; (now = System.nanoTime()) < due; ) LockSupport.parkNanos(due - now);
            HttpRequest request = HttpRequest.newBuilder(URI.create("http://" + host + ':' + port + "/api/messages"))
                    .timeout(Duration.ofSeconds(10)).header("Content-Type", "application/json")
                    .header("Idempotency-Key", "viewers-" + began + '-' + turn)
                            .POST(HttpRequest.BodyPublishers.ofString(
                            "{\"author\":\"test-failover\",\"body\":\"for the viewers, " + turn + "\"}")).build();
            while (!sent(request)) {
                refused.incrementAndGet();
                LockSupport.parkNanos(50_000_000);
            }
        }
    }

    private boolean sent(HttpRequest request) {
        try {
            HttpResponse<String> answer = http.send(request, HttpResponse.BodyHandlers.ofString());
            Matcher id = ID.matcher(answer.body());
            return answer.statusCode() / 100 == 2 && id.find()
                    && (acknowledged.add(Long.parseLong(id.group(1))) || true);
        } catch (IOException e) {
            return false;
        } catch (InterruptedException e) { throw new IllegalStateException(e); }
    }

    /** Somebody who stays: one stream after the other, each from where the last one ended. */
    private final class Viewer extends Thread {
        private final Set<Long> told = ConcurrentHashMap.newKeySet();
        private final List<String> wrong = new ArrayList<>();
        private final Set<Long> toldByFirst = ConcurrentHashMap.newKeySet();
        private volatile Set<Long> excused = Set.of();
        private String last = "";
        private volatile boolean joined;
        private volatile int returns = -1;

        @Override public void run() {
            while (viewing) {
                returns++;
                try (Socket socket = new Socket(host, port)) {
                    socket.setSoTimeout(SILENCE_MILLIS);
                    socket.getOutputStream().write(("GET /api/events HTTP/1.1\r\nHost: " + host + "\r\n"
                            + (last.isEmpty() ? "" : "Last-Event-ID: " + last + "\r\n") + "\r\n").getBytes(UTF_8));
                    read(new BufferedInputStream(socket.getInputStream(), 64 * 1024));
                } catch (IOException e) { /* it comes again */ }
                LockSupport.parkNanos(200_000_000);
            }
        }

        private void read(InputStream in) throws IOException {
            if (!line(in).contains(" 200 ")) return;
            while (!line(in).isEmpty()) { /* headers */ }
            String event = "message", id = null, data = null;
            for (String line; viewing; ) {
                line = line(new Chunked(in));
                joined = true;
                if (line.startsWith("event:")) event = line.substring(6).strip();
                else if (line.startsWith("id:")) id = line.substring(3).strip();
                else if (line.startsWith("data:")) data = line.substring(5).strip();
                else if (line.isEmpty() && data != null) {
                    if (!event.equals("visit")) told(event, id, data);
                    event = "message";
                    id = data = null;
                }
            }
        }

        private int left; // bytes of the chunk that is being read

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
            Matcher place = CURSOR.matcher(String.valueOf(id)), message = ID.matcher(data);
            if (event.equals("gap")) wrong.add("told of a gap: " + data);
            else if (!message.find()) wrong.add("an event with the data " + data);
            else if (firstVersion && (id == null || !id.contains("-") || !last.contains("-"))) {
                toldByFirst.add(Long.parseLong(message.group(1)));
                if (id != null) last = id;
                excused = Set.copyOf(acknowledged); // the first version lost some when an instance left
            } else if (!place.matches()) wrong.add("an event with the id " + id);
            else {
                if (!last.isEmpty() && !isAfter(place, last)) wrong.add(id + " was told after " + last);
                if (!told.add(Long.parseLong(message.group(1)))) wrong.add("message " + message.group(1)
                        + " was told twice");
                last = id;
            }
        }

        private static boolean isAfter(Matcher place, String before) {
            Matcher other = CURSOR.matcher(before);
            if (!other.matches()) return false;
            int byTransaction = Long.compare(Long.parseLong(place.group(1)), Long.parseLong(other.group(1)));
            return byTransaction > 0
                    || byTransaction == 0 && Long.parseLong(place.group(2)) > Long.parseLong(other.group(2));
        }

        boolean misses() { return missing() > 0; }

        private long missing() {
            return acknowledged.stream().filter(id -> !told.contains(id) && !excused.contains(id)).count();
        }

        synchronized List<String> wrong() {
            List<String> all = new ArrayList<>(wrong);
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
