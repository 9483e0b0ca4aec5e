import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.HttpURLConnection;
import java.net.SocketException;
import java.net.SocketTimeoutException;
import java.net.URI;
import java.net.UnknownHostException;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.security.Security;
import java.time.Duration;
import java.util.List;
import java.util.Queue;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.locks.LockSupport;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.IntStream;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * Subscribers of the event stream. They reconnect with Last-Event-ID, to whichever instance nginx selects, while other
 * clients write and the stack breaks. At the end each subscriber must have received every acknowledged message once, in
 * the order of the cursors.
 *
 * <p>{@code java SseClients.java HOST PORT RATE SUBSCRIBERS} prints "joined" when all subscribers have a stream. Then
 * it writes RATE messages a second until standard input ends or has a line. It prints `name=value` words, and a line
 * for each of the first findings. The program needs JDK 21 and no library.
 *
 * <p>HOST is a list, joined by commas: after a failure a client uses the next one. Two lists, joined by a slash, are
 * the two sides of a network partition: clients alternate between them.
 *
 * <pre>
 *   reconnects    streams after the first one of a subscriber
 *   unanswered    retried, and not acknowledged within 30 s after the end
 *   missing       acknowledged, but not received by a subscriber
 *   doubled       received twice
 *   out-of-order  received after an event with the same or a higher cursor
 *   gaps          `gap` events: messages that the server has skipped
 *   odd           anything else that an event stream must not contain
 * </pre>
 */
public final class SseClients {
    private static final int WRITERS = 64, CONNECT_MILLIS = 2_000, HEARTBEAT_TIMEOUT_MILLIS = 20_000, LAST_SECONDS = 30;
    private static final List<String> KINDS =
            List.of("unanswered", "missing", "doubled", "out-of-order", "gaps", "odd");
    private static final Pattern MESSAGE_ID = Pattern.compile("\"id\":([0-9]+)");

    private final List<List<String>> sides;
    private final int port;
    private final HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1)
            .connectTimeout(Duration.ofMillis(CONNECT_MILLIS)).build();
    private final Set<Long> acknowledged = ConcurrentHashMap.newKeySet(); // ids
    private final AtomicInteger written = new AtomicInteger(), retries = new AtomicInteger();
    private final Queue<Finding> findings = new ConcurrentLinkedQueue<>();
    private final long began = System.nanoTime();
    private volatile boolean writing = true;

    private record Finding(String kind, String text) {}

    private SseClients(String hosts, int port) {
        this.sides = Stream.of(hosts.split("/")).map(side -> List.of(side.split(","))).toList();
        this.port = port;
    }

    public static void main(String[] args) throws Exception {
        Security.setProperty("networkaddress.cache.ttl", "0"); // nginx may come back with another address
        Security.setProperty("networkaddress.cache.negative.ttl", "0");
        new SseClients(args[0], Integer.parseInt(args[1])).run(Integer.parseInt(args[2]), Integer.parseInt(args[3]));
        System.exit(0); // the streams have no end
    }

    private void run(int rate, int count) throws Exception {
        List<Subscriber> subscribers = IntStream.range(0, count).mapToObj(Subscriber::new).toList();
        subscribers.forEach(subscriber -> Thread.ofPlatform().start(subscriber));
        while (!subscribers.stream().allMatch(subscriber -> subscriber.joined)) Thread.sleep(10);
        System.out.println("joined");
        long start = System.nanoTime();
        List<Thread> writers = IntStream.range(0, WRITERS)
                .mapToObj(number -> Thread.ofPlatform().start(() -> write(start, rate, new Hosts(number)))).toList();
        System.in.read();
        writing = false;
        long deadline = System.nanoTime() + Duration.ofSeconds(LAST_SECONDS).toNanos();
        for (Thread writer : writers) writer.join(Duration.ofNanos(Math.max(1, deadline - System.nanoTime())));
        writers.stream().filter(Thread::isAlive).forEach(writer -> find("unanswered", "a message"));
        double seconds = (System.nanoTime() - start) / 1e9;
        deadline = System.nanoTime() + Duration.ofSeconds(LAST_SECONDS).toNanos();
        while (System.nanoTime() < deadline && subscribers.stream().anyMatch(Subscriber::misses)) Thread.sleep(100);
        subscribers.forEach(subscriber -> subscriber.missing().forEach(id -> find("missing", "message " + id)));
        report(seconds, subscribers);
    }

    private void find(String kind, String text) { findings.add(new Finding(kind, text)); }

    private void report(double seconds, List<Subscriber> subscribers) {
        StringBuilder counts = new StringBuilder(), lines = new StringBuilder();
        for (String kind : KINDS) {
            List<Finding> found = findings.stream().filter(finding -> finding.kind.equals(kind)).toList();
            counts.append(kind).append('=').append(found.size()).append(' ');
            found.stream().limit(5).forEach(finding -> lines.append("- " + kind + ": " + finding.text + "\n"));
        }
        System.out.printf("acknowledged=%d rate=%.0f retries=%d subscribers=%d reconnects=%d %swrong=%d%n%s",
                acknowledged.size(), acknowledged.size() / seconds, retries.get(), subscribers.size(),
                subscribers.stream().mapToInt(subscriber -> subscriber.streams - 1).sum(), counts, findings.size(),
                lines);
    }

    /** The hosts of a client's side, in turn. */
    private final class Hosts {
        private final List<String> hosts;
        private int turn;

        Hosts(int client) {
            hosts = sides.get(client % sides.size());
            turn = client / sides.size();
        }

        URI uri(String path) { return URI.create("http://" + hosts.get(turn % hosts.size()) + ":" + port + path); }
        void next() { turn++; }
    }

    /** Each message has a key of its own, and is sent until it is acknowledged. */
    private void write(long start, int rate, Hosts hosts) {
        while (writing) {
            int number = written.getAndIncrement();
            long due = start + number * 1_000_000_000L / rate;
            for (long now; (now = System.nanoTime()) < due; ) LockSupport.parkNanos(due - now);
            while (!isAcknowledged(number, hosts)) {
                retries.incrementAndGet();
                hosts.next();
                LockSupport.parkNanos(50_000_000);
            }
        }
    }

    private boolean isAcknowledged(int number, Hosts hosts) {
        String message = "{\"author\":\"test-failover\",\"body\":\"for the subscribers, " + number + "\"}";
        HttpRequest request = HttpRequest.newBuilder(hosts.uri("/api/messages")).timeout(Duration.ofSeconds(10))
                .header("Content-Type", "application/json").header("Idempotency-Key", "sse-" + began + "-" + number)
                .POST(HttpRequest.BodyPublishers.ofString(message)).build();
        try {
            HttpResponse<String> answer = http.send(request, HttpResponse.BodyHandlers.ofString());
            Matcher id = MESSAGE_ID.matcher(answer.body());
            if (answer.statusCode() / 100 != 2 || !id.find()) return false;
            acknowledged.add(Long.parseLong(id.group(1)));
            return true;
        } catch (IOException e) {
            return false;
        } catch (InterruptedException e) { throw new IllegalStateException(e); }
    }

    /** One stream after the other, each from the cursor at which the last one ended. */
    private final class Subscriber implements Runnable {
        private final Hosts hosts;
        private final Set<Long> received = ConcurrentHashMap.newKeySet(); // ids
        private Cursor last = new Cursor(0, 0);
        private String lastEventId = "";
        private volatile int streams;
        private volatile boolean joined;

        Subscriber(int number) { this.hosts = new Hosts(number); }

        @Override public void run() {
            for (; ; hosts.next()) {
                try {
                    readStream();
                } catch (SocketException | SocketTimeoutException | UnknownHostException e) {
                    // The stream has ended, or there is no host: the next one goes on.
                } catch (IOException | RuntimeException e) {
                    if (!"Premature EOF".equals(e.getMessage())) find("odd", e.toString());
                }
                LockSupport.parkNanos(200_000_000);
            }
        }

        /** HttpClient has no timeout for a stream without heartbeats. */
        private void readStream() throws IOException {
            HttpURLConnection connection = (HttpURLConnection) hosts.uri("/api/events").toURL().openConnection();
            connection.setConnectTimeout(CONNECT_MILLIS);
            connection.setReadTimeout(HEARTBEAT_TIMEOUT_MILLIS);
            if (!lastEventId.isEmpty()) connection.setRequestProperty("Last-Event-ID", lastEventId);
            if (connection.getResponseCode() != 200) return;
            streams++;
            String event = "message", id = null, data = null;
            try (BufferedReader in = new BufferedReader(new InputStreamReader(connection.getInputStream(), UTF_8))) {
                for (String line; (line = in.readLine()) != null; joined = true) {
                    if (line.startsWith("event:")) event = line.substring(6).strip();
                    else if (line.startsWith("id:")) id = line.substring(3).strip();
                    else if (line.startsWith("data:")) data = line.substring(5).strip();
                    else if (line.isEmpty()) {
                        receive(event, id, data);
                        event = "message";
                        id = data = null;
                    }
                }
            }
        }

        private void receive(String event, String id, String data) {
            if (data == null) lastEventId = id == null ? lastEventId : id; // where the stream begins
            else if (event.equals("gap")) find("gaps", data);
            else if (event.equals("message")) {
                Matcher message = MESSAGE_ID.matcher(data);
                if (id == null || !message.find()) throw new IllegalArgumentException("id " + id + ", data " + data);
                Cursor cursor = Cursor.parse(id);
                if (!cursor.isAfter(last)) find("out-of-order", "expected more than " + lastEventId + ", saw " + id);
                if (!received.add(Long.parseLong(message.group(1)))) find("doubled", data);
                last = cursor;
                lastEventId = id;
            }
        }

        boolean misses() { return missing().findAny().isPresent(); }
        Stream<Long> missing() { return acknowledged.stream().filter(id -> !received.contains(id)); }
    }

    /** The id of an event. */
    private record Cursor(long tx, long id) {
        static Cursor parse(String text) {
            String[] parts = text.split("-", 2);
            return new Cursor(Long.parseLong(parts[0]), Long.parseLong(parts[1]));
        }

        boolean isAfter(Cursor other) { return tx > other.tx || tx == other.tx && id > other.id; }
    }
}
