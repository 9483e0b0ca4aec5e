//SOURCES ../Service.java
import java.io.BufferedInputStream;
import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.file.Files;
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
 * The servers belong to this process and not to the instance, which has to have the image's class path and no more.
 */
public final class Train {
    private static final int CONNECTIONS = 32, SUBSCRIBERS = 8, ROUNDS = 3, OFTEN = 3;
    private static final String JSON = "application/json", FORM = "application/x-www-form-urlencoded";
    private static final String HTML = "text/html";
    private static final String MESSAGE = "{\"author\":\"Ada\",\"body\":\"Many small weights, \u00fc, \u2603, one.\"}";

    /** A request, what its status has to be, and how often it is sent in a round. */
    private record Ask(int times, int status, String method, String path, String body, String... headers) {

        /** As nginx sends it, with an id for each; but /metrics is not asked through nginx. */
        byte[] bytes() {
            String id = "train-" + SENT.incrementAndGet();
            StringBuilder text = new StringBuilder(method + " " + path + " HTTP/1.1\r\nHost: localhost\r\n");
            for (int i = 0; i < headers.length; i += 2) text.append(headers[i] + ": " + headers[i + 1] + "\r\n");
            if (!body.isEmpty()) text.append("Content-Length: " + body.getBytes(UTF_8).length + "\r\n");
            if (!path.equals("/metrics"))
                text.append("X-Request-Id: " + id + "\r\nX-Proxy-Request-Id: " + id + "\r\nX-Real-IP: 127.0.0.1\r\n"
                        + "X-Forwarded-For: 127.0.0.1\r\n");
            return text.append("\r\n" + body).toString().getBytes(UTF_8);
        }
    }

    /** All routes, each with the answers it has; what people do most comes most often. */
    private static final List<Ask> ASKS = List.of(
            new Ask(OFTEN, 200, "GET", "/", ""), new Ask(OFTEN, 200, "GET", "/api/messages", ""),
            new Ask(OFTEN, 201, "POST", "/api/messages", MESSAGE, "Content-Type", JSON),
            new Ask(2, 200, "GET", "/healthz", ""), new Ask(1, 200, "GET", "/readyz", ""),
            new Ask(1, 200, "GET", "/", "", "Accept", "text/html,application/xhtml+xml"),
            new Ask(1, 200, "GET", "/?limit=5&before=1000", "", "Accept", HTML),
            new Ask(1, 200, "HEAD", "/", ""), new Ask(1, 204, "OPTIONS", "/", ""),
            new Ask(1, 200, "GET", "/api/messages?limit=20", ""),
            new Ask(1, 200, "GET", "/api/messages?limit=5&before=100", ""),
            new Ask(1, 400, "GET", "/api/messages?limit=x", ""),
            new Ask(1, 200, "GET", "/api/messages/1", ""), new Ask(1, 404, "GET", "/api/messages/999999999", ""),
            new Ask(1, 200, "GET", "/api/visits", ""), new Ask(1, 200, "GET", "/api/instances", ""),
            new Ask(1, 200, "GET", "/metrics", ""), new Ask(1, 200, "GET", "/openapi.json", ""),
            new Ask(1, 404, "GET", "/nothing", ""), new Ask(1, 405, "DELETE", "/api/messages", ""),
            new Ask(1, 400, "POST", "/api/messages", "{\"author\":", "Content-Type", JSON),
            new Ask(1, 422, "POST", "/api/messages", "{\"author\":\"\",\"body\":\"\"}", "Content-Type", JSON),
            new Ask(1, 413, "POST", "/api/messages", " ".repeat(33_000), "Content-Type", JSON),
            new Ask(1, 415, "POST", "/api/messages", "hello", "Content-Type", "text/plain"),
            new Ask(1, 303, "POST", "/api/messages", "author=Ada&body=By+the+form", "Content-Type", FORM),
            new Ask(1, 422, "POST", "/api/messages", "author=&body=", "Content-Type", FORM, "Accept", HTML),
            new Ask(1, 200, "POST", "/api/messages", MESSAGE, "Content-Type", JSON, "Idempotency-Key", "train"));

    private static final AtomicLong SENT = new AtomicLong();

    public static void main(String[] command) throws Exception {
        Map<String, String> environment = Map.of("DATA_DIR", Files.createTempDirectory("train") + "/data");
        Embedded servers = new Embedded(Config.from(environment));
        try {
            Map<String, String> stores = servers.start(environment);
            int port = freePort();
            ProcessBuilder builder = new ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT)
                    .redirectOutput(ProcessBuilder.Redirect.DISCARD); // a line for each rejected request
            builder.environment().putAll(stores);
            builder.environment().putAll(Map.of("PORT", "" + port, "INSTANCE_ID", "train"));
            Process instance = builder.start();
            try {
                load(port);
            } finally {
                instance.destroy(); // SIGTERM: Java writes what it learned at its end
                if (!instance.waitFor(120, TimeUnit.SECONDS)) instance.destroyForcibly();
            }
        } finally {
            servers.close();
        }
    }

    private static int freePort() throws IOException {
        try (ServerSocket socket = new ServerSocket(0)) { return socket.getLocalPort(); }
    }

    /** Each connection sends all of them, beginning somewhere else, so that different ones meet. */
    private static void load(int port) throws Exception {
        awaitReady(port);
        try (Connection first = new Connection(port)) {
            first.ask(new Ask(1, 201, "POST", "/api/messages", MESSAGE, "Content-Type", JSON, "Idempotency-Key",
                    "train"));
        }
        List<Ask> round = new ArrayList<>();
        for (int time = 0; time < OFTEN; time++)
            for (Ask ask : ASKS) if (time < ask.times) round.add(ask);
        for (int i = 0; i < SUBSCRIBERS; i++) watch(port, i % 2 == 0 ? "" : "?after=0");
        long began = System.nanoTime();
        try (ExecutorService threads = Executors.newFixedThreadPool(CONNECTIONS)) {
            List<Future<?>> all = new ArrayList<>();
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
            for (Future<?> one : all) one.get();
        }
        System.out.printf(Locale.ROOT, "%d requests, each answered as expected, in %.1f s%n", SENT.get(),
                (System.nanoTime() - began) / 1e9);
    }

    private static void awaitReady(int port) throws Exception {
        for (long end = System.nanoTime() + 60_000_000_000L; ; Thread.sleep(50))
            try (Connection connection = new Connection(port)) {
                connection.ask(new Ask(1, 200, "GET", "/readyz", ""));
                return;
            } catch (IOException e) {
                if (System.nanoTime() > end) throw e;
            }
    }

    /** Somebody who watches until the instance stops; a thread of its own takes what comes. */
    private static void watch(int port, String query) throws IOException {
        Connection subscriber = new Connection(port);
        subscriber.socket.getOutputStream()
                .write(new Ask(1, 200, "GET", "/api/events" + query, "", "Accept", "text/event-stream").bytes());
        Thread.ofPlatform().daemon().start(() -> {
            try (subscriber) { subscriber.in.transferTo(OutputStream.nullOutputStream()); }
            catch (IOException end) { /* it stopped */ }
        });
    }

    /** A plain connection that stays open for as long as the instance lets it; java.net.http takes twice the time. */
    private static final class Connection implements AutoCloseable {
        private final int port;
        private Socket socket;
        private InputStream in;

        Connection(int port) throws IOException {
            this.port = port;
            open();
        }

        private void open() throws IOException {
            socket = new Socket("127.0.0.1", port);
            socket.setTcpNoDelay(true);
            in = new BufferedInputStream(socket.getInputStream());
        }

        void ask(Ask ask) throws IOException {
            if (socket.isClosed()) open();
            socket.setSoTimeout(30_000);
            socket.getOutputStream().write(ask.bytes());
            String line = line(), status = line;
            long length = 0;
            boolean last = false;
            while (!(line = line().toLowerCase(Locale.ROOT)).isEmpty()) {
                if (line.startsWith("content-length:")) length = Long.parseLong(line.substring(15).strip());
                last |= line.startsWith("connection: close");
            }
            if (!ask.method.equals("HEAD")) in.skipNBytes(length);
            if (last) socket.close();
            if (!status.startsWith("HTTP/1.1 " + ask.status + " "))
                throw new IOException("expected " + ask.status + ", got " + status + ": " + ask);
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
