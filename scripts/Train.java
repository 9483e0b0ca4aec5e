import io.zonky.test.db.postgres.embedded.EmbeddedPostgres;
import redis.embedded.RedisServer;

import java.io.IOException;
import java.net.ServerSocket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/**
 * Lets an instance work for some seconds, as it will have to work: {@code java Train COMMAND…} starts PostgreSQL and
 * Redis, then the command, which is an instance; asks for everything an instance has, over many connections; and stops
 * it. Java then writes down what it has learned (-XX:AOTCacheOutput, in the Dockerfile). It ends with 1 if an answer is
 * not the one expected: what is trained with wrong answers is no good.
 *
 * The servers belong to this process and not to the instance, which has to have the image's class path and no more.
 */
public final class Train {
    private static final int CONNECTIONS = 32, VIEWERS = 8, ROUNDS = 26, OFTEN = 12;
    private static final String JSON = "application/json", FORM = "application/x-www-form-urlencoded";
    private static final String HTML = "text/html";
    private static final String MESSAGE = "{\"author\":\"Ada\",\"body\":\"Many small weights, \u00fc, \u2603, one.\"}";

    /** A request, what its status has to be, and how often it is sent in a round. */
    private record Ask(int times, int status, String method, String path, String body, String... headers) {}

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

    private final HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    private final AtomicLong sent = new AtomicLong();
    private final String address;

    private Train(int port) { address = "http://127.0.0.1:" + port; }

    public static void main(String[] command) throws Exception {
        RedisServer redis = RedisServer.newRedisServer().port(freePort()).build();
        redis.start();
        try (EmbeddedPostgres postgres = EmbeddedPostgres.start()) {
            int port = freePort();
            ProcessBuilder builder = new ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT)
                    .redirectOutput(ProcessBuilder.Redirect.DISCARD); // a line for each refused request
            builder.environment().putAll(Map.of("PORT", "" + port, "INSTANCE_ID", "train", "DRAIN_MILLIS", "0",
                    "DB_HOST", "127.0.0.1", "DB_PORT", "" + postgres.getPort(), "DB_NAME", "postgres",
                    "DB_USER", "postgres", "REDIS_HOST", "127.0.0.1", "REDIS_PORT", "" + redis.ports().getFirst()));
            Process instance = builder.start();
            try {
                new Train(port).run();
            } finally {
                instance.destroy(); // SIGTERM: Java writes what it learned at its end
                if (!instance.waitFor(120, TimeUnit.SECONDS)) instance.destroyForcibly();
            }
        } finally {
            redis.stop();
        }
    }

    private static int freePort() throws IOException {
        try (ServerSocket socket = new ServerSocket(0)) { return socket.getLocalPort(); }
    }

    /** Each connection sends all of them, beginning somewhere else, so that different ones meet. */
    private void run() throws Exception {
        awaitReady();
        send(new Ask(1, 201, "POST", "/api/messages", MESSAGE, "Content-Type", JSON, "Idempotency-Key", "train"));
        List<Ask> round = new ArrayList<>();
        for (int time = 0; time < OFTEN; time++)
            for (Ask ask : ASKS) if (time < ask.times) round.add(ask);
        for (int i = 0; i < VIEWERS; i++)
            client.sendAsync(request("GET", "/api/events" + (i % 2 == 0 ? "" : "?after=" + i), "",
                    "Accept", "text/event-stream"), BodyHandlers.discarding());
        long began = System.nanoTime();
        try (ExecutorService threads = Executors.newFixedThreadPool(CONNECTIONS)) {
            List<Future<?>> all = new ArrayList<>();
            for (int i = 0; i < CONNECTIONS; i++) {
                int offset = i * round.size() / CONNECTIONS;
                all.add(threads.submit(() -> {
                    for (int n = 0; n < ROUNDS * round.size(); n++) send(round.get((n + offset) % round.size()));
                    return null;
                }));
            }
            for (Future<?> one : all) one.get();
        }
        System.out.printf(Locale.ROOT, "%d requests, each answered as expected, in %.1f s%n", sent.get(),
                (System.nanoTime() - began) / 1e9);
    }

    private void awaitReady() throws Exception {
        for (long end = System.nanoTime() + 60_000_000_000L; ; Thread.sleep(50))
            try {
                send(new Ask(1, 200, "GET", "/readyz", ""));
                return;
            } catch (IOException e) {
                if (System.nanoTime() > end) throw e;
            }
    }

    private void send(Ask ask) throws IOException, InterruptedException {
        int status = client.send(request(ask.method, ask.path, ask.body, ask.headers), BodyHandlers.discarding())
                .statusCode();
        if (status != ask.status) throw new IOException("expected " + ask.status + ", got " + status + ": " + ask);
    }

    /** As nginx sends it, with an id for each; but /metrics is not asked through nginx. */
    private HttpRequest request(String method, String path, String body, String... headers) {
        String id = "train-" + sent.incrementAndGet();
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(address + path)).timeout(Duration.ofSeconds(30))
                .method(method, body.isEmpty() ? BodyPublishers.noBody() : BodyPublishers.ofString(body));
        if (headers.length > 0) request.headers(headers);
        if (!path.equals("/metrics"))
            request.headers("X-Request-Id", id, "X-Proxy-Request-Id", id, "X-Real-IP", "127.0.0.1",
                    "X-Forwarded-For", "127.0.0.1");
        return request.build();
    }
}
