import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * Clients that send a request and read nothing, or a byte a second; each has a connection of its own.
 *
 * <p>{@code java SlowClients.java HOST PORT MESSAGES SUBSCRIBERS PAGES SECONDS} stores MESSAGES of the longest kind.
 * Then SUBSCRIBERS request the events after the first of them, and PAGES clients the largest pages, HTML and JSON in
 * turn. After SECONDS it prints how many clients got a connection (`open`), the statuses of the answers (`told`), and
 * how many answers with 503 or 429 had no Retry-After (`unkind`). The program needs JDK 21 and no library.
 */
public final class SlowClients {
    private static final Pattern CURSOR = Pattern.compile("\"cursor\":\"([0-9-]+)\"");
    private static final int MAX_HEAD = 1_024;

    private final String host;
    private final int port;
    private final HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    private final List<Reader> readers = new ArrayList<>();

    private SlowClients(String host, int port) {
        this.host = host;
        this.port = port;
    }

    public static void main(String[] args) throws Exception {
        int[] numbers = Stream.of(args).skip(1).mapToInt(Integer::parseInt).toArray();
        SlowClients clients = new SlowClients(args[0], numbers[0]);
        String cursor = clients.store(numbers[1]);
        for (int i = 0; i < numbers[2]; i++) clients.open("/api/events?after=" + cursor);
        for (int i = 0; i < numbers[3]; i++) clients.open(i % 2 == 0 ? "/?limit=100" : "/api/messages?limit=100");
        clients.read(numbers[4]);
        clients.report();
        System.exit(0); // closes all connections
    }

    /** @return the cursor before the messages */
    private String store(int messages) throws Exception {
        Matcher cursor = CURSOR.matcher(exchange(request("/api/messages?limit=1")).body());
        if (!cursor.find()) throw new IOException("expected a page of messages with a cursor");
        for (int number = 0; number < messages; number++) store("\ud83d\ude42".repeat(1_990) + number);
        return cursor.group(1);
    }

    /** Retries on 503 with Retry-After, because other slow clients may occupy the buffers already. */
    private void store(String text) throws Exception {
        HttpRequest.Builder message = request("/api/messages").header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString("{\"author\":\"test-failover\",\"body\":\"" + text + "\"}"));
        HttpResponse<String> answer = exchange(message);
        for (int tries = 1; tries < 60 && answer.headers().firstValue("Retry-After").isPresent(); tries++) {
            Thread.sleep(500);
            answer = exchange(message);
        }
        if (answer.statusCode() != 201) throw new IOException("expected 201, saw " + answer + " " + answer.body());
    }

    private HttpRequest.Builder request(String path) {
        return HttpRequest.newBuilder(URI.create("http://" + host + ":" + port + path));
    }

    private HttpResponse<String> exchange(HttpRequest.Builder request) throws Exception {
        return http.send(request.build(), HttpResponse.BodyHandlers.ofString());
    }

    private void open(String path) {
        try {
            readers.add(new Reader(path));
        } catch (IOException e) { /* no room for more clients */ }
    }

    private void read(int seconds) throws InterruptedException {
        long end = System.nanoTime() + seconds * 1_000_000_000L;
        while (System.nanoTime() < end) {
            Thread.sleep(1_000);
            for (int i = 0; i < readers.size(); i += 2) readers.get(i).readByte();
        }
    }

    private void report() {
        Map<String, Integer> statuses = new TreeMap<>();
        for (Reader reader : readers) {
            while (reader.head.length() < MAX_HEAD && reader.readByte()) { /* the rest of the head */ }
            statuses.merge(reader.status(), 1, Integer::sum);
        }
        System.out.println("open=" + readers.size() + " unkind="
                + readers.stream().filter(Reader::lacksRetryAfter).count() + " told="
                + statuses.toString().replaceAll("[{} ]", "").replace('=', ':'));
    }

    private final class Reader {
        private final StringBuilder head = new StringBuilder(); // what it has read so far
        private final Socket socket = new Socket();

        Reader(String path) throws IOException {
            socket.setReceiveBufferSize(4_096);
            socket.connect(new InetSocketAddress(host, port), 2_000);
            socket.setSoTimeout(1);
            String accept = path.startsWith("/?") ? "text/html" : "*/*";
            socket.getOutputStream().write(("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nAccept: " + accept
                    + "\r\n\r\n").getBytes(UTF_8));
        }

        /** @return false if there is nothing to read, or the connection is closed */
        boolean readByte() {
            byte[] one = new byte[1];
            try {
                if (socket.getInputStream().read(one) <= 0) return false;
                head.append(new String(one, ISO_8859_1));
                return true;
            } catch (IOException e) { return false; }
        }

        String status() { return head.length() < 12 ? "nothing" : head.substring(9, 12); }

        boolean lacksRetryAfter() {
            return List.of("503", "429").contains(status())
                    && !head.toString().toLowerCase().contains("\r\nretry-after: ");
        }
    }
}
