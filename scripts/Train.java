import java.io.BufferedInputStream;
import java.io.EOFException;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * Lets an instance work for some seconds, as it will have to work: {@code java Train COMMAND…} starts PostgreSQL and
 * Redis, then the command, which is an instance; asks for everything an instance has, over many connections; and stops
 * it. Java then writes down what it has learned (-XX:AOTCacheOutput, in the Dockerfile). It ends with 1 if an answer is
 * not the one expected: what is trained with wrong answers is no good.
 *
 * The servers are those of Embedded, in this process and not in the instance: its class path has to be the image's.
 */
public final class Train {
    private static final int CONNECTIONS = 32, VIEWERS = 8, ROUNDS = Integer.getInteger("rounds", 26), MOST = 12;

    private static final AtomicLong SENT = new AtomicLong();

    /** A request, what its status has to be, and how often it is sent in a round. */
    private record Ask(int times, int status, String head, String body) {
        static Ask of(int times, int status, String method, String path, String headers, String body) {
            int length = body.getBytes(UTF_8).length;
            return new Ask(times, status, method + " " + path + " HTTP/1.1\r\nHost: localhost\r\n" + headers
                    + (length > 0 ? "Content-Length: " + length + "\r\n" : ""), body);
        }

        /** As nginx sends it, with an id for each; but /metrics is not asked through nginx. */
        byte[] bytes() {
            String id = "train-" + SENT.incrementAndGet();
            String proxied = head.contains("/metrics") ? "" : "X-Request-Id: " + id + "\r\nX-Proxy-Request-Id: " + id
                    + "\r\nX-Real-IP: 127.0.0.1\r\nX-Forwarded-For: 127.0.0.1\r\n";
            return (head + proxied + "\r\n" + body).getBytes(UTF_8);
        }

        static Ask get(int times, int status, String path, String... headers) {
            return of(times, status, "GET", path, headers.length == 0 ? "" : headers[0] + "\r\n", "");
        }

        static Ask post(int times, int status, String type, String headers, String body) {
            return of(times, status, "POST", "/api/messages", "Content-Type: " + type + "\r\n" + headers, body);
        }
    }

    private static final String JSON = "application/json", FORM = "application/x-www-form-urlencoded";
    private static final String MESSAGE = "{\"author\":\"Ada\",\"body\":\"Many small weights, \u00fc, \u2603, one answer.\"}";

    /** All routes, each with the answers it has; what people do most comes most often. */
    private static final List<Ask> ASKS = List.of(
            Ask.get(MOST, 200, "/"), Ask.post(MOST, 201, JSON, "", MESSAGE), Ask.get(MOST, 200, "/api/messages"),
            Ask.get(1, 200, "/", "Accept: text/html,application/xhtml+xml"),
            Ask.get(1, 200, "/?limit=5&before=1000", "Accept: text/html"),
            Ask.get(1, 200, "/api/messages?limit=20"), Ask.get(1, 200, "/api/messages?limit=5&before=100"),
            Ask.get(1, 200, "/api/messages/1"), Ask.get(1, 404, "/api/messages/999999999"),
            Ask.get(1, 200, "/api/visits"), Ask.get(2, 200, "/healthz"), Ask.get(1, 200, "/readyz"),
            Ask.get(1, 200, "/metrics"), Ask.get(1, 200, "/openapi.json"), Ask.get(1, 404, "/nothing"),
            Ask.get(1, 400, "/api/messages?limit=x"), Ask.of(1, 405, "DELETE", "/api/messages", "", ""),
            Ask.of(1, 200, "HEAD", "/", "", ""), Ask.of(1, 204, "OPTIONS", "/", "", ""),
            Ask.post(1, 400, JSON, "", "{\"author\":"), Ask.post(1, 422, JSON, "", "{\"author\":\"\",\"body\":\"\"}"),
            Ask.post(1, 413, JSON, "", " ".repeat(33_000)), Ask.post(1, 415, "text/plain", "", "hello"),
            Ask.post(1, 303, FORM, "", "author=Ada&body=By+the+form"),
            Ask.post(1, 422, FORM, "Accept: text/html\r\n", "author=&body=By+the+form"),
            Ask.post(1, 200, JSON, "Idempotency-Key: train\r\n", MESSAGE));

    public static void main(String[] command) throws Exception {
        Path folder = Files.createTempDirectory("train");
        Log.start("train");
        try (Embedded servers = new Embedded(Config.from(Map.of("DATA_DIR", folder.resolve("data").toString())))) {
            Config stores = servers.start();
            int port = freePort();
            Process instance = instance(List.of(command), stores, port);
            try {
                long began = System.nanoTime();
                load(port);
                System.out.printf(Locale.ROOT, "%d requests, each answered as expected, in %.1f s%n",
                        CONNECTIONS * ROUNDS * ASKS.stream().mapToInt(Ask::times).sum(),
                        (System.nanoTime() - began) / 1e9);
            } finally {
                instance.destroy();                                // SIGTERM: Java writes what it learned at its end
                if (!instance.waitFor(120, TimeUnit.SECONDS)) instance.destroyForcibly();
            }
        }
        Log.flush();
    }

    private static Process instance(List<String> command, Config stores, int port) throws IOException {
        ProcessBuilder builder = new ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT)
                .redirectOutput(new File("/dev/null"));            // a line for each refused request
        builder.environment().putAll(Map.of("PORT", String.valueOf(port), "INSTANCE_ID", "train", "DRAIN_MILLIS", "0",
                "DB_HOST", stores.postgres().hosts().getFirst().toString(), "DB_NAME", stores.postgres().name(),
                "DB_USER", stores.postgres().user(), "DB_PASS", stores.postgres().pass().value(),
                "REDIS_HOST", stores.redis().hosts().getFirst().toString(),
                "REDIS_PASS", stores.redis().pass().value()));
        return builder.start();
    }

    private static int freePort() throws IOException {
        try (ServerSocket socket = new ServerSocket(0)) { return socket.getLocalPort(); }
    }

    /** Each connection sends all of them, beginning somewhere else, so that different ones meet. */
    private static void load(int port) throws Exception {
        awaitReady(port);
        try (Connection first = new Connection(port)) { first.ask(Ask.post(1, 201, JSON, "Idempotency-Key: train\r\n", MESSAGE)); }
        List<Ask> round = new ArrayList<>();
        for (int time = 0; time < MOST; time++)
            for (Ask ask : ASKS) if (time < ask.times) round.add(ask);
        List<Socket> viewers = new ArrayList<>();
        for (int i = 0; i < VIEWERS; i++) viewers.add(view(port, i % 2 == 0 ? "" : "?after=" + i));
        try (ExecutorService threads = Executors.newFixedThreadPool(CONNECTIONS)) {
            List<Future<Void>> all = new ArrayList<>();
            for (int i = 0; i < CONNECTIONS; i++) {
                int offset = i * round.size() / CONNECTIONS;
                all.add(threads.submit(() -> {
                    try (Connection connection = new Connection(port)) {
                        for (int n = 0; n < ROUNDS * round.size(); n++)
                            connection.ask(round.get((n + offset) % round.size()));
                    }
                    return null;
                }));
            }
            for (Future<Void> one : all) one.get();
        }
        for (Socket viewer : viewers) viewer.close();
    }

    private static void awaitReady(int port) throws Exception {
        for (long end = System.nanoTime() + 60_000_000_000L; ; Thread.sleep(50))
            try (Connection connection = new Connection(port)) {
                connection.ask(Ask.get(1, 200, "/readyz"));
                return;
            } catch (IOException e) {
                if (System.nanoTime() > end) throw e;
            }
    }

    /** Somebody who watches; a thread of its own takes what comes. */
    private static Socket view(int port, String query) throws IOException {
        Socket socket = new Socket("127.0.0.1", port);
        socket.getOutputStream().write(Ask.get(1, 200, "/api/events" + query, "Accept: text/event-stream").bytes());
        Thread.ofPlatform().daemon().start(() -> {
            try (InputStream in = socket.getInputStream()) { in.transferTo(OutputStream.nullOutputStream()); }
            catch (IOException closed) { /* the end */ }
        });
        return socket;
    }

    /** A plain connection that stays open for as long as the instance lets it. */
    private static final class Connection implements AutoCloseable {
        private final int port;
        private Socket socket;
        private InputStream in;

        Connection(int port) throws IOException {
            this.port = port;
            open();
        }

        private void open() throws IOException {
            socket = new Socket();
            socket.setTcpNoDelay(true);
            socket.setSoTimeout(30_000);
            socket.connect(new InetSocketAddress("127.0.0.1", port), 1_000);
            in = new BufferedInputStream(socket.getInputStream());
        }

        void ask(Ask ask) throws IOException {
            if (socket.isClosed()) open();
            socket.getOutputStream().write(ask.bytes());
            String line = line(), status = line;
            long length = 0;
            boolean last = false;
            while (!(line = line().toLowerCase(Locale.ROOT)).isEmpty()) {
                if (line.startsWith("content-length:")) length = Long.parseLong(line.substring(15).strip());
                if (line.startsWith("connection: close")) last = true;
            }
            if (!ask.head.startsWith("HEAD ")) in.skipNBytes(length);
            if (last) socket.close();
            if (!status.startsWith("HTTP/1.1 " + ask.status + " "))
                throw new IOException("expected " + ask.status + ", got " + status + " for " + ask.head + ask.body);
        }

        private String line() throws IOException {
            StringBuilder line = new StringBuilder();
            for (int c; (c = in.read()) != '\n'; ) {
                if (c < 0) throw new EOFException("the instance closed the connection");
                if (c != '\r') line.append((char) c);
            }
            return line.toString();
        }

        @Override public void close() throws IOException { socket.close(); }
    }
}
