///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
//DEPS org.junit.jupiter:junit-jupiter:6.1.3
//DEPS org.junit.platform:junit-platform-console:6.1.3
//SOURCES ../../Service.java
//SOURCES ConfigurationTest.java HttpTest.java MessagesTest.java EventsTest.java
//SOURCES OutageTest.java StoresTest.java InstancesTest.java EmbeddedTest.java LayersTest.java

import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import org.junit.jupiter.api.AssertionFailureBuilder;
import org.junit.jupiter.api.extension.*;
import org.junit.platform.console.ConsoleLauncher;
import redis.clients.jedis.Jedis;

import java.io.*;
import java.lang.management.ManagementFactory;
import java.net.*;
import java.net.http.*;
import java.nio.file.Files;
import java.nio.file.Path;
import java.sql.*;
import java.time.Duration;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.logging.*;
import java.util.stream.Collectors;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * The service's own tests, against a real PostgreSQL and a real Redis that they start for themselves.
 *
 * <pre>
 *   ./jbang tests/service/ServiceTest.java             all of them
 *   ./jbang tests/service/ServiceTest.java NAME ...    those whose class or method name contains NAME
 * </pre>
 *
 * Here: the list of test classes, and what they share. They need neither Docker nor nginx nor a certain port; the tests
 * of the whole stack are in tests/stack.
 */
final class ServiceTest {
    static final List<Class<?>> SUBJECTS = List.of(ConfigurationTest.class, HttpTest.class, MessagesTest.class,
            EventsTest.class, OutageTest.class, StoresTest.class, InstancesTest.class,
            EmbeddedTest.class, LayersTest.class);

    public static void main(String[] names) { run(SUBJECTS, names); }

    static void run(List<Class<?>> subjects, String... names) {
        System.setProperty("java.io.tmpdir", Servers.FOLDER.toString()); // removed with what libraries unpack
        LogCapture.collect();
        Servers.three(); // on a busy machine their start takes longer than a test may
        List<String> arguments = new ArrayList<>(List.of("execute", "--disable-banner", "--fail-if-no-tests",
                "--details=tree", "--details-theme=ascii", "--disable-ansi-colors", "--config",
                "junit.jupiter.displayname.generator.default="
                + "org.junit.jupiter.api.DisplayNameGenerator$ReplaceUnderscores",
                "--config", "junit.jupiter.execution.timeout.default=60 s"));
        for (Class<?> subject : subjects) arguments.add("--select-class=" + subject.getName());
        for (String name : names) arguments.add("--include-methodname=(?i).*" + name.replace(' ', '_') + ".*");
        int code = ConsoleLauncher.run(new PrintWriter(System.out), new PrintWriter(System.err),
                arguments.toArray(String[]::new)).getExitCode();
        Servers.close();
        System.exit(code);
    }
}

/** The log of all instances, in this process or started as programs; its last lines are printed for a failed test. */
final class LogCapture implements BeforeEachCallback, TestWatcher {
    private static final ConcurrentLinkedDeque<String> LINES = new ConcurrentLinkedDeque<>();

    /** Takes the lines instead of the service's own writer, which never starts here; so they stay off the screen. */
    static void collect() {
        Thread.ofPlatform().name("test-log").daemon().start(() -> {
            try {
                while (true) add(Log.take());
            } catch (InterruptedException e) { /* the end */ }
        });
        LogManager.getLogManager().reset();
        Logger.getLogger("").addHandler(new Handler() {
            @Override public void publish(LogRecord record) {
                if (record.getLevel().intValue() >= Level.WARNING.intValue())
                    add("library " + record.getLoggerName() + ": " + record.getMessage() + " " + record.getThrown());
            }
            @Override public void flush() {}
            @Override public void close() {}
        });
    }

    @Override public void beforeEach(ExtensionContext context) { clear(); }

    @Override public void testFailed(ExtensionContext context, Throwable why) {
        System.out.println("FAIL  " + context.getDisplayName() + ": " + why + "\n  the log, last lines:");
        last(20).forEach(line -> System.out.println("    " + line.substring(0, Math.min(line.length(), 500))));
    }

    static void add(String line) {
        LINES.add(line);
        while (LINES.size() > 5_000) LINES.poll();
    }

    static void clear() { LINES.clear(); }

    static List<String> all() { return new ArrayList<>(LINES); }

    /** The last lines; of lines that differ only in time and request, as polling causes them, the last one. */
    static List<String> last(int count) {
        LinkedHashMap<String, String> different = new LinkedHashMap<>();
        for (String line : all()) different.putLast(line.replaceAll("\"(time|request)\":\"[^\"]*\",", ""), line);
        return different.values().stream().skip(Math.max(0, different.size() - count)).toList();
    }
}

/**
 * The PostgreSQL and the Redis that all tests share, with three instances. All files of a run are in one folder. A
 * guard, a shell at the other end of a pipe, removes them and ends all servers when this process ends, even by kill -9.
 */
final class Servers {
    static final Path FOLDER = folder();
    private static final AtomicInteger DATABASES = new AtomicInteger();
    private static Process guard;
    private static Embedded embedded;
    private static Config config;
    private static List<Instance> three;
    private static String database;

    private static final String GUARD = """
            trap '' INT TERM HUP
            cat >/dev/null
            for file in "$0"/program-*.pid; do
                [ -f "$file" ] && kill -KILL "$(cat "$file")"
            done
            for file in "$0"/*/redis/redis.pid "$0"/*/postgres/postmaster.pid; do
                [ -f "$file" ] && pid=$(head -n 1 "$file") && kill -QUIT "$pid" && kill -CONT "$pid"
            done
            for exe in /proc/[0-9]*/exe; do # on Linux also those that a broken service has lost
                case $(readlink "$exe") in "$0"/*) ;; *) continue ;; esac
                pid=${exe#/proc/}; kill -QUIT "${pid%/exe}"; kill -CONT "${pid%/exe}"
            done
            for try in 1 2 3 4 5 6 7 8 9; do rm -rf "$0" && exit; sleep 1; done
            """;

    private static Path folder() {
        try {
            Path folder = Path.of(System.getProperty("java.io.tmpdir"), "threefold-test-" + ProcessHandle.current()
                    .pid());
            Files.createDirectories(folder);
            guard = new ProcessBuilder("sh", "-c", GUARD, folder.toString())
                    .redirectOutput(ProcessBuilder.Redirect.DISCARD)
                    .redirectError(ProcessBuilder.Redirect.DISCARD).start();
            Runtime.getRuntime().addShutdownHook(new Thread(Servers::close));
            return folder;
        } catch (IOException e) { throw new UncheckedIOException(e); }
    }

    private static synchronized Config servers() {
        try {
            if (embedded == null) {
                Map<String, String> environment = Map.of("INSTANCE_ID", "test",
                        "DATA_DIR", FOLDER.resolve("shared").toString());
                embedded = new Embedded(Config.from(environment));
                config = Config.from(embedded.start(environment));
            }
            return config;
        } catch (Config.Invalid e) { throw new IllegalStateException(e); }
    }

    static int redisPort() { return servers().redis().hosts().getFirst().getPort(); }
    static int databasePort() { return servers().postgres().hosts().getFirst().getPort(); }

    /** For a test that starts its own Redis. */
    static Path redisProgram() throws IOException {
        servers();
        try (Stream<Path> versions = Files.list(FOLDER.resolve("shared/redis-bin"))) {
            return versions.findFirst().orElseThrow().resolve("redis-server");
        }
    }

    /** The password of both servers. */
    static String password() { return servers().redis().pass().value(); }

    /** web1, web2 and web3 on one database, for all tests that do not disturb them. */
    static synchronized List<Instance> three() {
        if (three == null) {
            database = newDatabase();
            three = Stream.of("web1", "web2", "web3").map(name -> new Instance(name, database)).toList();
            three.forEach(Instance::awaitReady);
        }
        return three;
    }

    /** The database of web1, web2 and web3. */
    static String database() { return database; }

    static Instance one() { return three().getFirst(); }

    /** The environment of an instance that uses both servers, without PORT and INSTANCE_ID; other values override. */
    static Map<String, String> environment(String database, String... namesAndValues) {
        Map<String, String> all = new HashMap<>(Map.of("REDIS_HOST", "127.0.0.1", "REDIS_PORT", "" + redisPort(),
                "DB_HOST", "127.0.0.1", "DB_PORT", "" + databasePort(), "DB_NAME", database, "DB_USER", "postgres",
                "DB_PASS", password(), "REDIS_PASS", password(), "DRAIN_MILLIS", "0"));
        for (int i = 0; i < namesAndValues.length; i += 2) all.put(namesAndValues[i], namesAndValues[i + 1]);
        return all;
    }

    static Jedis jedis() {
        Jedis jedis = new Jedis("127.0.0.1", redisPort());
        jedis.auth(password());
        return jedis;
    }

    static String newDatabase() {
        String name = "board" + DATABASES.incrementAndGet();
        sql("postgres", "CREATE DATABASE " + name);
        return name;
    }

    static Connection connect(String database) throws SQLException {
        return DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + databasePort() + "/" + database, "postgres",
                password());
    }

    /** The first column of the result, if there is one. */
    static List<String> sql(String database, String statement) {
        try (Connection connection = connect(database);
             var work = connection.createStatement()) {
            List<String> rows = new ArrayList<>();
            if (work.execute(statement))
                for (ResultSet row = work.getResultSet(); row.next(); ) rows.add(row.getString(1));
            return rows;
        } catch (SQLException e) { throw new IllegalStateException(statement, e); }
    }

    /** Below the ports of outgoing connections, also with 10,000 more: the second port of a Redis Cluster. */
    static int freePort() {
        while (true) {
            int port = ThreadLocalRandom.current().nextInt(20_000, 22_700);
            try (ServerSocket socket = new ServerSocket(port)) {
                return socket.getLocalPort();
            } catch (IOException e) { /* taken: another one */ }
        }
    }

    static synchronized void close() {
        if (guard == null) return;
        if (three != null) three.forEach(Instance::close);
        if (embedded != null) embedded.close();
        try {
            guard.getOutputStream().close();
            if (!guard.waitFor(15, TimeUnit.SECONDS)) System.out.println("could not remove " + FOLDER);
        } catch (IOException | InterruptedException e) { System.out.println("could not clear up: " + e); }
        guard = null;
    }
}

/** Polls a condition, instead of sleeping for a fixed time. */
final class Wait {
    /** The 2 s that the contract promises, and a second more for a busy machine. */
    static final Duration PROMISED = Duration.ofSeconds(2).plusSeconds(1);

    interface Condition { boolean holds() throws Exception; }

    static void until(String what, Condition condition) { until(what, Duration.ofSeconds(15), condition); }

    static void until(String what, Duration most, Condition condition) {
        long end = System.nanoTime() + most.toNanos();
        Object last = false;
        do {
            try {
                if (condition.holds()) return;
                last = "it did not hold";
            } catch (Exception | AssertionError e) { last = e; }
            pause();
        } while (System.nanoTime() < end);
        throw new AssertionError("expected within " + most.toMillis() + " ms: " + what + "; in the end: " + last);
    }

    private static void pause() {
        try {
            Thread.sleep(20);
        } catch (InterruptedException e) { throw new IllegalStateException("it took too long", e); }
    }

    /** On a thread of its own: the common pool has one thread on two cores, and the HTTP client needs it. */
    static <T> CompletableFuture<T> meanwhile(Callable<T> work) {
        CompletableFuture<T> result = new CompletableFuture<>();
        Thread.ofVirtual().start(() -> {
            try {
                result.complete(work.call());
            } catch (Throwable e) { result.completeExceptionally(e); }
        });
        return result;
    }

    /** Runs all at the same time, each on a thread of its own; returns the results in the same order. */
    static <T> List<T> together(List<? extends Callable<T>> work) throws Exception {
        try (ExecutorService threads = Executors.newVirtualThreadPerTaskExecutor()) {
            List<T> results = new ArrayList<>();
            for (Future<T> one : threads.invokeAll(work)) results.add(one.get());
            return results;
        } catch (ExecutionException e) { throw e.getCause() instanceof Exception cause ? cause : e; }
    }
}

/** A response. */
record Answer(int status, Map<String, List<String>> headers, String body) {
    String header(String name) {
        List<String> values = headers.get(name);
        return values == null ? null : values.getFirst();
    }

    JsonObject json() { return JsonParser.parseString(body).getAsJsonObject(); }

    String text(String field) { return json().get(field).getAsString(); }

    long id() { return json().get("id").getAsLong(); }

    Answer expect(int expected) {
        if (status != expected) throw AssertionFailureBuilder.assertionFailure().message("status")
                .expected(expected).actual(status + " in " + this).build();
        return this;
    }

    /** Expects an error of RFC 9457 that names these fields or parameters, and no internals of the service. */
    Answer problem(int expected, String... named) {
        expect(expected);
        String type = header("content-type");
        if (type == null || !type.startsWith("application/problem+json"))
            throw AssertionFailureBuilder.assertionFailure()
                .message("type").expected("application/problem+json").actual(type + " in " + this).build();
        if (json().get("status").getAsInt() != expected || json().get("title").getAsString().isBlank())
            throw new AssertionError("expected a title and the status " + expected + ", actual: " + this);
        for (String name : named)
            if (!body.contains(name)) throw new AssertionError("expected a problem that names " + name + ", actual: "
                    + this);
        if (body.contains("Exception") || body.contains("\\tat ") || body.contains(".java"))
            throw new AssertionError("expected a problem without internals, actual: " + this);
        return this;
    }

    /** Expects a 503 with the time of a retry. */
    Answer unavailable() {
        problem(503);
        if (header("retry-after") == null) throw new AssertionError("expected Retry-After, actual: " + this);
        return this;
    }

    static Map<String, List<String>> anyCase(Map<String, List<String>> headers) {
        Map<String, List<String>> found = new TreeMap<>(String.CASE_INSENSITIVE_ORDER);
        found.putAll(headers);
        return found;
    }
}

/** Sends requests to one instance. */
class Caller {
    static final HttpClient CLIENT = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1)
            .connectTimeout(Duration.ofSeconds(5)).build();
    static final String JSON = "application/json", FORM = "application/x-www-form-urlencoded";
    final int port;

    Caller(int port) { this.port = port; }

    URI uri(String path) { return URI.create("http://127.0.0.1:" + port + path); }

    RawConnection connect() throws IOException { return new RawConnection(port); }

    /** Sends exactly these bytes, on a connection of their own. */
    Answer raw(String request) throws IOException {
        try (RawConnection connection = connect()) { return connection.send(request).read(); }
    }

    /** @param headers names and values */
    CompletableFuture<Answer> later(String method, String path, byte[] body, String... headers) {
        HttpRequest.Builder request = HttpRequest.newBuilder(uri(path)).timeout(Duration.ofSeconds(20))
                .method(method, body == null ? HttpRequest.BodyPublishers.noBody()
                        : HttpRequest.BodyPublishers.ofByteArray(body));
        if (headers.length > 0) request.headers(headers);
        return CLIENT.sendAsync(request.build(), HttpResponse.BodyHandlers.ofByteArray()).thenApply(response ->
                new Answer(response.statusCode(), Answer.anyCase(response.headers().map()),
                        new String(response.body(), UTF_8)));
    }

    Answer send(String method, String path, byte[] body, String... headers) {
        try {
            return later(method, path, body, headers).get(25, TimeUnit.SECONDS);
        } catch (Exception e) {
            throw new AssertionError("expected an answer to " + method + " " + path + ", actual: " + e, e);
        }
    }

    Answer get(String path, String... headers) { return send("GET", path, null, headers); }

    Answer post(byte[] json, String... headers) {
        return send("POST", "/api/messages", json, and(headers, "Content-Type", JSON));
    }

    Answer post(String json, String... headers) { return post(json.getBytes(UTF_8), headers); }

    /** Posts a message as JSON. */
    Answer save(String author, String body, String... headers) { return post(message(author, body), headers); }

    Answer form(String encoded, String... headers) {
        return send("POST", "/api/messages", encoded.getBytes(UTF_8), and(headers, "Content-Type", FORM));
    }

    static String message(String author, String body) {
        JsonObject json = new JsonObject();
        json.addProperty("author", author);
        json.addProperty("body", body);
        return json.toString();
    }

    long visits() { return get("/").expect(200).json().get("visits").getAsLong(); }

    /** Whether a visit gets a number, instead of null. */
    boolean counts() { return !get("/").expect(200).json().get("visits").isJsonNull(); }

    long total() { return get("/api/visits").expect(200).json().get("total").getAsLong(); }

    /** The status of /readyz, whatever the code of the response. */
    String status() { return get("/readyz").text("status"); }

    void awaitReady() {
        Wait.until("ready", Duration.ofSeconds(30), () -> get("/readyz").expect(200).text("status").equals("ready"));
    }

    void awaitDegraded() { Wait.until("degraded", () -> status().equals("degraded")); }

    /** The value of a metric, its labels included in the name. */
    double metric(String name) {
        return get("/metrics").expect(200).body().lines().filter(line -> line.startsWith(name + " "))
                .mapToDouble(line -> Double.parseDouble(line.substring(name.length()).strip())).findFirst().orElse(0);
    }

    static String[] and(String[] some, String... more) {
        return Stream.concat(Stream.of(some), Stream.of(more)).toArray(String[]::new);
    }
}

/** An instance in this process, on a port of its own. */
final class Instance extends Caller implements AutoCloseable {
    final Service service;
    final String name, database;
    private boolean closed;

    /** On a new database. */
    Instance(String name) { this(name, Servers.newDatabase()); }

    Instance(String name, String database, String... namesAndValues) {
        this(name, database, start(name, Servers.environment(database, namesAndValues)));
    }

    private Instance(String name, String database, Service service) {
        super(service.port());
        this.name = name;
        this.database = database;
        this.service = service;
    }

    List<String> sql(String statement) { return Servers.sql(database, statement); }

    private static Service start(String name, Map<String, String> environment) {
        for (int tries = 1; ; tries++) {
            Map<String, String> all = new HashMap<>(environment);
            all.put("INSTANCE_ID", name);
            all.put("PORT", "" + Servers.freePort());
            try {
                return new Service(Config.from(all)).start();
            } catch (Config.Invalid e) { // another program took the port first
                if (tries == 3) throw new IllegalStateException(e);
            } catch (IOException e) { throw new UncheckedIOException(e); }
        }
    }

    @Override public void close() {
        if (!closed) service.close();
        closed = true;
    }
}

/** An instance as a program of its own, `java Service` or `jbang Service.java`, with a clean environment. */
final class Program extends Caller implements AutoCloseable {
    private static final String CLASS_PATH = System.getProperty("java.class.path");

    final Process process;
    private final List<String> out = new ArrayList<>(), err = new ArrayList<>();
    private final List<Thread> readers = new ArrayList<>();
    private final Path pidFile;

    private Program(List<String> command, Map<String, String> environment) throws IOException {
        super(Servers.freePort());
        ProcessBuilder builder = new ProcessBuilder(command).directory(root().toFile());
        builder.environment().keySet().retainAll(Set.of("PATH", "LANG", "LC_ALL", "JAVA_HOME"));
        builder.environment().putAll(Map.of("HOME", "" + Servers.FOLDER, "INSTANCE_ID", "program", "PORT", "" + port));
        builder.environment().putAll(environment);
        process = builder.start();
        pidFile = Files.writeString(Servers.FOLDER.resolve("program-" + process.pid() + ".pid"), "" + process.pid());
        read(process.getInputStream(), out);
        read(process.getErrorStream(), err);
    }

    static Program java(Map<String, String> environment) throws IOException {
        return new Program(command(CLASS_PATH), environment);
    }

    /** With the libraries that the image has, which has no embedded servers. */
    static Program withoutServers(Map<String, String> environment) throws IOException {
        return new Program(command(Stream.of(CLASS_PATH.split(":"))
                .filter(jar -> !jar.matches(".*/(embedded-|commons-compress-|xz-).*"))
                .collect(Collectors.joining(":"))), environment);
    }

    /** Started by a shell that runs a command first. */
    static Program javaAfter(String before, Map<String, String> environment) throws IOException {
        List<String> command = new ArrayList<>(List.of("sh", "-c", before + "; exec \"$@\"", "sh"));
        command.addAll(command(CLASS_PATH));
        return new Program(command, environment);
    }

    /** Started in a terminal, whose keyboard is the process's standard input. */
    static Program atTerminal(Map<String, String> environment) throws IOException {
        return new Program(List.of("script", "-qec", "exec '" + String.join("' '", command(CLASS_PATH)) + "'",
                "/dev/null"), environment);
    }

    private static List<String> command(String classPath) {
        List<String> command = new ArrayList<>(List.of(System.getProperty("java.home") + "/bin/java",
                "-Djava.io.tmpdir=" + Servers.FOLDER));
        command.addAll(ManagementFactory.getRuntimeMXBean().getInputArguments());
        command.addAll(List.of("-cp", classPath, "Service"));
        return command;
    }

    static Program jbang(Map<String, String> environment) throws IOException {
        Map<String, String> all = new HashMap<>(environment);
        all.put("HOME", System.getProperty("user.home")); // JBang's downloads are there
        all.put("JAVA_TOOL_OPTIONS", "-Djava.io.tmpdir=" + Servers.FOLDER);
        for (String name : List.of("JBANG_DIR", "JBANG_CACHE_DIR", "JBANG_REPO", "MAVEN_CENTRAL"))
            if (System.getenv(name) != null) all.put(name, System.getenv(name));
        return new Program(List.of(root().resolve("jbang").toString(), "Service.java"), all);
    }

    /** The checkout: where Service.java and jbang are. */
    static Path root() {
        for (Path folder = Path.of("").toAbsolutePath(); folder != null; folder = folder.getParent())
            if (Files.exists(folder.resolve("Service.java")) && Files.exists(folder.resolve("jbang"))) return folder;
        throw new IllegalStateException("run this inside the checkout");
    }

    private void read(InputStream from, List<String> to) {
        readers.add(Thread.ofVirtual().start(() -> {
            try (BufferedReader lines = new BufferedReader(new InputStreamReader(from, UTF_8))) {
                for (String line; (line = lines.readLine()) != null; ) {
                    synchronized (to) { to.add(line); }
                    LogCapture.add("program " + process.pid() + ": " + line);
                }
            } catch (IOException e) { /* it ended */ }
        }));
    }

    List<String> out() { synchronized (out) { return List.copyOf(out); } }
    List<String> err() { synchronized (err) { return List.copyOf(err); } }

    int exitCode() throws InterruptedException {
        if (!process.waitFor(40, TimeUnit.SECONDS)) throw new AssertionError("expected an end, but it still runs");
        for (Thread reader : readers) reader.join(5_000);
        return process.exitValue();
    }

    @Override public void close() throws IOException {
        process.destroy();
        try {
            if (!process.waitFor(15, TimeUnit.SECONDS)) process.destroyForcibly().waitFor();
        } catch (InterruptedException e) { process.destroyForcibly(); }
        Files.deleteIfExists(pidFile);
    }
}

/** A TCP connection, to send what no HTTP client would send. */
final class RawConnection implements AutoCloseable {
    final Socket socket;
    private final InputStream in;

    RawConnection(int port) throws IOException { this(port, 0); }

    /** @param buffer the size of the receive buffer, 0: the system's default */
    RawConnection(int port, int buffer) throws IOException {
        socket = new Socket();
        if (buffer > 0) socket.setReceiveBufferSize(buffer);
        socket.connect(new InetSocketAddress("127.0.0.1", port), 5_000);
        socket.setSoTimeout(15_000);
        in = new java.io.BufferedInputStream(socket.getInputStream(), Math.max(buffer, 8_192));
    }

    RawConnection send(String text) throws IOException { return send(text.getBytes(UTF_8)); }

    RawConnection send(byte[] bytes) throws IOException {
        socket.getOutputStream().write(bytes);
        return this;
    }

    /** Sends also to a server that has closed the connection: its response may have arrived before. */
    RawConnection push(byte[] bytes) {
        try {
            send(bytes);
        } catch (IOException e) { /* the response matters */ }
        return this;
    }

    RawConnection end() throws IOException {
        socket.shutdownOutput();
        return this;
    }

    Answer read() throws IOException { return read(false); }

    Answer read(boolean toHead) throws IOException {
        String status = line();
        if (!status.startsWith("HTTP/1.")) throw new AssertionError("expected an answer, actual: " + status);
        Map<String, List<String>> headers = new TreeMap<>(String.CASE_INSENSITIVE_ORDER);
        for (String line; !(line = line()).isEmpty(); )
            headers.computeIfAbsent(line.substring(0, line.indexOf(':')), n -> new ArrayList<>())
                    .add(line.substring(line.indexOf(':') + 1).strip());
        int code = Integer.parseInt(status.substring(9, 12));
        byte[] body = toHead || code == 204 || code < 200 ? new byte[0] : body(headers);
        return new Answer(code, headers, new String(body, UTF_8));
    }

    private byte[] body(Map<String, List<String>> headers) throws IOException {
        if (headers.containsKey("content-length"))
            return in.readNBytes(Integer.parseInt(headers.get("content-length").getFirst()));
        if (!headers.containsKey("transfer-encoding")) return in.readAllBytes();
        ByteArrayOutputStream all = new ByteArrayOutputStream();
        for (int size; (size = Integer.parseInt(line(), 16)) > 0; line()) all.write(in.readNBytes(size));
        line();
        return all.toByteArray();
    }

    String line() throws IOException {
        ByteArrayOutputStream line = new ByteArrayOutputStream();
        for (int c; (c = in.read()) != '\n'; ) {
            if (c < 0) throw new EOFException("expected an answer, but the connection was closed after \"" + line
                    + '"');
            line.write(c);
        }
        return line.toString(ISO_8859_1).stripTrailing();
    }

    /** Waits for the end of the connection; false if it stays open. */
    boolean isClosed() {
        try {
            return in.read() < 0;
        } catch (java.net.SocketTimeoutException e) { return false; } catch (IOException e) { return true; }
    }

    @Override public void close() throws IOException { socket.close(); }
}

/** A TCP proxy in front of a server that can be cut, hang, be mended, or lose one response. */
final class FaultProxy implements AutoCloseable {
    private final int port = Servers.freePort(), target;
    private final Set<Socket> sockets = ConcurrentHashMap.newKeySet();
    private final AtomicInteger accepted = new AtomicInteger();
    private volatile int generation; // connections of an earlier one never go on
    private volatile boolean hanging, closed;
    private volatile String losing;
    private volatile ServerSocket listener;

    FaultProxy(int target) throws IOException {
        this.target = target;
        mend();
    }

    int port() { return port; }

    /** The number of connections so far. */
    int accepted() { return accepted.get(); }

    /** Holds back all bytes of open and new connections until mended. */
    void hang() { hanging = true; }

    /** As a server that loses power: open connections are silent for ever, new ones are refused until mended. */
    void vanish() throws IOException {
        generation++;
        stopListening();
    }

    /** Closes open connections, and refuses new ones until mended. */
    void cut() throws IOException {
        stopListening();
        for (Socket socket : sockets) drop(socket);
    }

    private void stopListening() throws IOException {
        ServerSocket was = listener;
        listener = null;
        if (was != null) was.close();
    }

    synchronized void mend() throws IOException {
        hanging = false;
        if (listener != null) return;
        ServerSocket opened = new ServerSocket();
        opened.setReuseAddress(true);
        for (int tries = 0; !opened.isBound(); tries++) // the port of a socket just closed may be taken for a moment
            try {
                opened.bind(new InetSocketAddress(InetAddress.getLoopbackAddress(), port), 200);
            } catch (java.net.BindException e) {
                if (tries == 100) throw e;
                java.util.concurrent.locks.LockSupport.parkNanos(20_000_000);
            }
        listener = opened;
        Thread.ofVirtual().start(() -> accept(opened));
    }

    /** Passes on the next request with this word in it, and closes the connection instead of its response. */
    void loseResponseTo(String word) { losing = word; }

    boolean hasLost() { return losing == null; }

    private void accept(ServerSocket at) {
        while (!at.isClosed()) {
            Socket here = null;
            try {
                here = at.accept();
                accepted.incrementAndGet();
                sockets.add(here);
                Socket from = here;
                Thread.ofVirtual().start(() -> join(from));
            } catch (IOException e) { drop(here); }
        }
    }

    private void join(Socket here) {
        int openedIn = generation;
        try {
            waitWhileHanging(openedIn);
            Socket there = new Socket("127.0.0.1", target);
            sockets.add(there);
            AtomicInteger lost = new AtomicInteger();
            Thread.ofVirtual().start(() -> pump(here, there, lost, true, openedIn));
            pump(there, here, lost, false, openedIn);
        } catch (IOException | InterruptedException e) { drop(here); }
    }

    private void pump(Socket from, Socket to, AtomicInteger lost, boolean requests, int openedIn) {
        try {
            byte[] bytes = new byte[65_536];
            InputStream in = from.getInputStream();
            OutputStream out = to.getOutputStream();
            for (int count; (count = in.read(bytes)) >= 0; out.write(bytes, 0, count)) {
                waitWhileHanging(openedIn);
                String word = losing;
                if (requests && word != null && new String(bytes, 0, count, ISO_8859_1).contains(word)) lost.set(1);
                if (!requests && lost.get() == 1) {
                    losing = null;
                    break;
                }
            }
        } catch (IOException | InterruptedException e) { /* then both ends close */ }
        drop(from);
        drop(to);
    }

    private void waitWhileHanging(int openedIn) throws InterruptedException {
        while ((hanging || openedIn != generation) && !closed) Thread.sleep(5);
    }

    private void drop(Socket socket) {
        try {
            if (socket != null && sockets.remove(socket)) {
                socket.setSoLinger(true, 0);
                socket.close();
            }
        } catch (IOException e) { /* it was closed already */ }
    }

    @Override public void close() throws IOException {
        closed = true;
        cut();
    }
}
