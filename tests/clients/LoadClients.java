import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;

import java.io.BufferedInputStream;
import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.SocketTimeoutException;
import java.security.Security;
import java.time.LocalTime;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Queue;
import java.util.Scanner;
import java.util.Set;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.function.IntConsumer;
import java.util.function.Predicate;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.IntStream;
import java.util.stream.LongStream;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.UTF_8;
import static java.util.stream.Collectors.counting;
import static java.util.stream.Collectors.groupingBy;
import static java.util.stream.Collectors.joining;

/**
 * The clients that load the stack through nginx while its parts stop, die and hang. They record each attempt of each
 * request in a history. At the end they compare the history with the stored messages and the counter, as Jepsen does:
 *
 * <pre>
 *   failed      answered without 2xx, or with other content
 *   lost        acknowledged, but not stored, or stored under another id
 *   doubled     one text stored twice
 *   unexpected  stored, but never sent by a client of this run
 *   ids         one id of two messages
 *   counting    a visit number that repeats or decreases, or a total that does not fit
 *   unknown     sent without an answer: stored once, or not at all
 * </pre>
 *
 * {@code java LoadClients.java HOST PORT RUN} reads commands from standard input (see {@link #command}) until it ends.
 * The output of a command is a line of {@code name=value} words, a line for each finding, and a line with a dot.
 * The program needs JDK 21 and no library.
 */
public final class LoadClients {

    public static void main(String[] args) throws Exception {
        Security.setProperty("networkaddress.cache.ttl", "0"); // nginx may come back with another address
        Security.setProperty("networkaddress.cache.negative.ttl", "0");
        LoadClients clients = new LoadClients(args[0], Integer.parseInt(args[1]), args[2]);
        for (Scanner commands = new Scanner(System.in, UTF_8); commands.hasNextLine(); ) {
            Report report = new Report();
            try {
                clients.command(commands.nextLine().split(" "), report);
            } catch (IOException e) {
                report.findings("error", Stream.of(e));
            }
            System.out.println(report + "\n.");
        }
    }

    private void command(String[] words, Report report) throws Exception {
        switch (words[0]) {
            case "hello"       -> report.value("run", run);
            case "via"         -> setHosts(List.of(words).subList(1, words.length));
            case "start"       -> start(words[1], Mode.valueOf(words[2]));
            case "mark"        -> current.repaired = now(); // the recovery time counts from here
            case "seen"        -> report.value("instances", current.instancesSince(now() - 1_000));
            case "count"       -> report.value("acknowledged", current.count(attempt -> attempt.number > 0));
            case "others"      -> current.otherVisits += Integer.parseInt(words[1]);
            case "flood"       -> load.add(Integer.parseInt(words[1]), number -> new Client(number).flood());
            case "stop"        -> stop(report);
            case "everything"  -> checkEverything(report);
            case "direct"      -> startDirect(words[1]);
            case "direct-stop" -> stopDirect(report);
            case "disconnect"  -> disconnect(Integer.parseInt(words[1]), report);
            case "spoof"       -> spoof(report);
            default -> throw new IllegalArgumentException(words[0]);
        }
    }

    /** The output of a command. */
    private static final class Report {
        private final List<String> values = new ArrayList<>(), lines = new ArrayList<>();

        void value(String name, Object value) { values.add(name + "=" + value); }

        /** The number of findings, and the first five of them. */
        void findings(String name, Stream<?> findings) {
            List<?> all = findings.toList();
            value(name, all.size());
            all.stream().limit(5).forEach(finding -> lines.add("\n- " + name + ": " + finding));
        }

        @Override public String toString() { return String.join(" ", values) + String.join("", lines); }
    }

    private static String expected(Object expected, Object seen) { return "expected " + expected + ", saw " + seen; }

    // ---------------------------------------------------------------------------------------------------- Load

    /** A dozen clients with a request each 30 ms: 400 a second. */
    private static final int CLIENTS = 12, PERIOD_MILLIS = 30;
    private static final int RESPONSE_MILLIS = 10_000, SHORT_CONNECT_MILLIS = 1_000;
    private static final int RETRY_MILLIS = Integer.getInteger("patience", 20) * 1_000;
    private static final String AUTHOR = "test-failover";

    /** The reaction of the clients to a request that fails. */
    private enum Mode {
        /** No retry, and every failure is a finding. */
        planned,
        /** No retry either. An instance may count a visit and die before it responds. */
        once,
        /** Retries with the same Idempotency-Key. One client in four sends no key and does not retry. */
        retry
    }

    private final int port;
    private final String run;
    private final Set<String> attempted = ConcurrentHashMap.newKeySet(); // texts
    private final Queue<Stored> acknowledged = new ConcurrentLinkedQueue<>();
    private final TreeSet<Long> visits = new TreeSet<>();
    private List<List<String>> sides;
    private Workers load;
    private Case current;
    private int cases;

    private LoadClients(String host, int port, String run) {
        this.port = port;
        this.run = run;
        setHosts(List.of(host));
        Thread.ofPlatform().daemon().start(this::watchStalls);
    }

    /** Clients alternate between the sides of a partition, and after a failure between the hosts of their side. */
    private void setHosts(List<String> words) { sides = words.stream().map(side -> List.of(side.split(","))).toList(); }

    private void start(String name, Mode mode) throws Exception {
        current = new Case(name + "." + ++cases, mode);
        longestStall = 0;
        load = new Workers();
        load.add(CLIENTS, number -> new Client(number).run());
        awaitAnswers();
    }

    /** A second of load, or the same number of good answers on a busy machine. */
    private void awaitAnswers() {
        long enough = current.count(Attempt::isGood) + CLIENTS * 1_000 / PERIOD_MILLIS;
        long giveUp = now() + RESPONSE_MILLIS;
        while (current.count(Attempt::isGood) < enough && now() < giveUp) pause(50);
    }

    private void stop(Report report) throws Exception {
        awaitAnswers();
        load.stop();
        current.ended = now();
        current.summarize(report);
        report.value("stall", longestStall);
        compare(report, current.name + "/", readBack(current.newestBefore));
        report.findings("counting", current.countingErrors(totalVisits()).stream());
    }

    /** One user: a keep-alive connection, and one request after the other. */
    private final class Client {
        private final int number;
        private final boolean keyless;
        private final Connection connection;
        private Stored own;

        Client(int number) {
            this.number = number;
            keyless = number % (current.mode == Mode.retry ? 4 : 2) == 1;
            List<String> hosts = sides.get(number % sides.size());
            boolean nextIsBetter = current.mode == Mode.retry || hosts.size() > 1;
            connection = new Connection(hosts, number / sides.size(),
                    nextIsBetter ? SHORT_CONNECT_MILLIS : RESPONSE_MILLIS);
        }

        void run() {
            pause(number * PERIOD_MILLIS / CLIENTS);
            for (int n = 0; load.running; n++) {
                long next = now() + PERIOD_MILLIS;
                switch (n % 12) {
                    case 0, 3, 6, 9  -> post(n);
                    case 1, 4, 7, 10 -> send(Kind.VISIT, get("/", "Accept: application/json"));
                    case 2, 8        -> send(Kind.READ, get("/api/messages?limit=20"));
                    case 5           -> send(Kind.PAGE, get("/", "Accept: text/html"));
                    default          -> readOwn();
                }
                pause(next - now());
            }
            connection.close();
        }

        void flood() {
            while (load.running) send(Kind.FLOOD, get("/healthz"));
            connection.close();
        }

        private void post(int n) {
            String text = newText(current.name, number + "-" + n);
            String key = "Idempotency-Key: " + run + "." + current.name + "." + number + "." + n;
            Answer answer = send(Kind.POST, keyless ? message(text) : message(text, key));
            if (!answer.isGood()) return;
            Stored stored = stored(answer.body).findFirst().orElse(null);
            if (stored != null && stored.text.equals(text)) acknowledged.add(own = stored);
            else current.failures.add("POST: " + expected(text, answer.body));
        }

        /** An acknowledged message can be read at once from any instance. */
        private void readOwn() {
            if (own == null) return;
            Answer answer = send(Kind.READ, get("/api/messages/" + own.id));
            if (answer.isGood() && !stored(answer.body).toList().equals(List.of(own)))
                current.failures.add("READ: " + expected(own, answer.body));
        }

        /** @return the last answer, after retries as {@link Mode} allows them */
        private Answer send(Kind kind, String request) {
            long giveUp = now() + RETRY_MILLIS;
            for (int wait = 50; ; wait = Math.min(400, 2 * wait)) {
                Answer answer = attempt(kind, request);
                boolean mayRetry = current.mode == Mode.retry && answer.isTemporary();
                if (answer.isGood() || mayRetry && keyless) return answer;
                if (!mayRetry || now() > giveUp) {
                    current.failures.add(kind + ": " + expected("2xx", answer));
                    return answer;
                }
                pause(wait);
            }
        }

        private Answer attempt(Kind kind, String request) {
            long began = now();
            Answer answer = connection.exchange(request);
            current.history.add(new Attempt(number, kind, began, now(), answer.outcome, answer.instance(),
                    answer.isGood() ? kind.number(answer.body) : 0));
            if (Set.of("503", "429").contains(answer.outcome) && !answer.headers.containsKey("retry-after"))
                current.failures.add(kind + ": " + expected("Retry-After", answer));
            return answer;
        }
    }

    /** The end of a text is outside ASCII, so that a text that is damaged on its way counts as lost. */
    private String newText(String group, String number) {
        String text = run + "/" + group + "/" + number + " \u00fc\u2603";
        attempted.add(text);
        return text;
    }

    // ------------------------------------------------------------------------------------------------- History

    /** The kind of a request, and the number in its answer: the id of a message, or the number of a visit. */
    private enum Kind {
        POST("\"id\":(\\d+)"), VISIT("\"visits\":(\\d+)"), PAGE("id=\"visit\">\\D*([\\d,]+)<"),
        READ("(?!)"), FLOOD("(?!)"); // none

        private final Pattern number;

        Kind(String number) { this.number = Pattern.compile(number); }

        /** @return 0 if there is none */
        long number(String body) {
            Matcher found = number.matcher(body);
            return found.find() ? Long.parseLong(found.group(1).replace(",", "")) : 0;
        }
    }

    private record Attempt(int client, Kind kind, long began, long ended, String outcome, String instance,
            long number) {
        boolean isAnswered() { return Character.isDigit(outcome.charAt(0)); }
        boolean isGood() { return outcome.startsWith("2"); }
        boolean isVisit() { return kind == Kind.VISIT || kind == Kind.PAGE; }
        boolean isCounted() { return isVisit() && number > 0; }
        /** Failed, or a visit without a number because Redis is unavailable. */
        boolean isDegraded() { return !isGood() || isVisit() && !isCounted(); }
    }

    /** What happened between `start` and `stop`. */
    private final class Case {
        final String name;
        final Mode mode;
        final long newestBefore, visitsBefore, began = now();
        final Queue<Attempt> history = new ConcurrentLinkedQueue<>();
        final Queue<String> failures = new ConcurrentLinkedQueue<>();
        int otherVisits;
        long repaired, ended;

        Case(String name, Mode mode) throws IOException {
            this.name = name;
            this.mode = mode;
            newestBefore = Kind.POST.number(read("/api/messages?limit=1")); // the first id is the highest
            visitsBefore = totalVisits();
        }

        long count(Predicate<Attempt> which) { return history.stream().filter(which).count(); }

        long instancesSince(long time) {
            return history.stream().filter(attempt -> attempt.isAnswered() && attempt.ended >= time)
                    .map(Attempt::instance).distinct().count();
        }

        void summarize(Report report) {
            report.value("sent", history.size());
            report.value("posts", count(attempt -> attempt.kind == Kind.POST));
            report.value("visits", count(Attempt::isVisit));
            report.value("reads", count(attempt -> attempt.kind == Kind.READ));
            report.value("flood", count(attempt -> attempt.kind == Kind.FLOOD));
            report.value("rate", history.size() * 1_000L / Math.max(1, ended - began));
            report.value("outcomes", history.stream().collect(groupingBy(Attempt::outcome, TreeMap::new, counting()))
                    .toString().replaceAll("[{} ]", "").replace('=', ':'));
            report.findings("failed", failures.stream());
            report.value("slowest", history.stream().filter(Attempt::isAnswered)
                    .mapToLong(attempt -> attempt.ended - attempt.began).max().orElse(0));
            report.value("gap", longestWithout(Attempt::isGood));
            report.value("without-storing", longestWithout(attempt -> attempt.kind == Kind.POST && attempt.number > 0));
            report.value("without-counting", longestWithout(Attempt::isCounted));
            if (repaired > 0) report.value("back", recoveryMillis());
        }

        private LongStream times(Predicate<Attempt> which) {
            return history.stream().filter(which).mapToLong(Attempt::ended);
        }

        private long longestWithout(Predicate<Attempt> which) {
            long longest = 0, last = began;
            for (long time : LongStream.concat(times(which), LongStream.of(ended)).sorted().toArray()) {
                longest = Math.max(longest, time - last);
                last = time;
            }
            return longest;
        }

        /** From the repair to the last failure, or to the end if no good answer came after it. */
        private long recoveryMillis() {
            long lastGood = times(Attempt::isGood).max().orElse(0);
            long lastBad = times(Attempt::isDegraded).max().orElse(0);
            return lastGood < Math.max(repaired, lastBad) ? ended - repaired : Math.max(0, lastBad - repaired);
        }

        /** Visit numbers are unique and increase for each client, and the total fits them. */
        List<String> countingErrors(long total) {
            List<String> errors = new ArrayList<>();
            Map<Integer, Long> previous = new HashMap<>();
            history.stream().filter(Attempt::isCounted).forEach(visit -> {
                long before = previous.getOrDefault(visit.client, 0L);
                previous.put(visit.client, visit.number);
                if (visit.number <= before) errors.add(expected("a visit above " + before, visit.number));
                if (!visits.add(visit.number)) errors.add("visit " + visit.number + " was given twice");
            });
            long counted = total - visitsBefore, least = count(Attempt::isCounted);
            long most = count(Attempt::isVisit) + otherVisits;
            // An instance may count a visit and die; nginx retries it elsewhere. A case breaks three instances at most.
            if (mode != Mode.planned) most += 3 * CLIENTS;
            if (counted < least || counted > most) errors.add("counted: " + expected(least + " to " + most, counted));
            if (!visits.isEmpty() && total < visits.last())
                errors.add("total: " + expected("at least " + visits.last(), total));
            if (least > CLIENTS * 12 && count(attempt -> attempt.kind == Kind.PAGE && attempt.number > 0) == 0)
                errors.add("pages: " + expected("visit numbers", "none"));
            return errors;
        }
    }

    // ------------------------------------------------------------------------------------------- Stored messages

    private record Stored(long id, String text) {}

    private static final Pattern STORED = Pattern.compile(
            "\"id\":(\\d+),\"author\":\"" + AUTHOR + "\",\"body\":\"([^\"\\\\]*)\"");

    private static Stream<Stored> stored(String json) {
        return STORED.matcher(json).results().map(match -> new Stored(Long.parseLong(match.group(1)), match.group(2)));
    }

    private void checkEverything(Report report) throws IOException {
        report.value("messages", acknowledged.size());
        report.value("unknown", attempted.size() - acknowledged.size());
        compare(report, "", readBack(acknowledged.stream().mapToLong(Stored::id).min().orElse(1) - 1));
    }

    /** Compares the acknowledged texts that contain {@code part} with the stored messages. */
    private void compare(Report report, String part, List<Stored> messages) {
        Map<String, List<Stored>> byText = messages.stream().collect(groupingBy(Stored::text));
        Map<Long, List<Stored>> byId = messages.stream().collect(groupingBy(Stored::id));
        report.findings("lost", acknowledged.stream().filter(message -> message.text.contains(part))
                .filter(message -> !byText.getOrDefault(message.text, List.of()).contains(message))
                .map(message -> expected(message, byText.get(message.text))));
        report.findings("doubled", byText.values().stream().filter(same -> same.size() > 1));
        report.findings("unexpected", messages.stream().filter(message -> !attempted.contains(message.text)));
        report.findings("ids", byId.values().stream().filter(same -> same.size() > 1));
    }

    /** The messages of this run with an id above {@code floor}. */
    private List<Stored> readBack(long floor) throws IOException {
        List<Stored> messages = new ArrayList<>();
        Pattern next = Pattern.compile("\"next\":\"([^\"]*before=(\\d+)[^\"]*)\"");
        for (String path = "/api/messages?limit=100"; path != null; ) {
            String page = read(path);
            stored(page).filter(message -> message.id > floor && message.text.startsWith(run + "/"))
                    .forEach(messages::add);
            Matcher older = next.matcher(page);
            path = older.find() && Long.parseLong(older.group(2)) > floor ? older.group(1) : null;
        }
        return messages;
    }

    private long totalVisits() throws IOException {
        Matcher total = Pattern.compile("^\\{\"total\":(\\d+)").matcher(read("/api/visits"));
        if (!total.find()) throw new IOException("/api/visits: " + expected("a total", "none"));
        return Long.parseLong(total.group(1));
    }

    /** A read outside of the load, with retries for as long as a case may take to recover. */
    private String read(String path, String... headers) throws IOException {
        try (Connection connection = new Connection(sides.getFirst(), 0, SHORT_CONNECT_MILLIS)) {
            for (long giveUp = now() + RETRY_MILLIS; ; pause(100)) {
                Answer answer = connection.exchange(get(path, headers));
                if (answer.outcome.equals("200")) return answer.body;
                if (now() > giveUp) throw new IOException(path + ": " + expected("200", answer));
            }
        }
    }

    // ---------------------------------------------------------------------------------------- Draining instance

    private final Queue<String> cuts = new ConcurrentLinkedQueue<>();
    private final Map<Integer, Long> closing = new ConcurrentHashMap<>(); // when a connection got `Connection: close`
    private volatile long lastDirectAnswer;
    private Workers direct;

    /** Ten connections to an instance, as nginx keeps them: idle for 0.1 to 1.9 s between two requests. */
    private void startDirect(String instance) {
        cuts.clear();
        closing.clear();
        direct = new Workers();
        direct.add(10, number -> keepConnection(instance, number));
    }

    /**
     * Ends when the port is closed. The instance may refuse a new connection, or reset one that waited in the queue of
     * the port. It must not cut a connection that it has kept, without `Connection: close` in the answer before.
     */
    private void keepConnection(String instance, int number) {
        int idle = 100 + 200 * number;
        try (Connection connection = new Connection(List.of(instance), 0, SHORT_CONNECT_MILLIS)) {
            for (; direct.running; pause(idle)) {
                boolean kept = connection.isOpen();
                Answer answer = connection.exchange(get("/api/messages?limit=1"));
                if (!answer.isAnswered()) {
                    if (kept) cuts.add("idle for " + idle + " ms: " + expected("an answer", answer));
                    return;
                }
                lastDirectAnswer = now();
                if (answer.closes()) closing.putIfAbsent(number, now());
            }
        }
    }

    private void stopDirect(Report report) throws Exception {
        direct.stop();
        report.findings("cut", cuts.stream());
        report.value("asked-to-go", closing.size());
        report.value("leaving", closing.isEmpty() ? 0 : lastDirectAnswer - Collections.min(closing.values()));
    }

    // ------------------------------------------------------------------------------------------- Hostile clients

    /** Clients, 64 at a time, that reset the connection in the middle of an exchange. */
    private void disconnect(int count, Report report) throws Exception {
        AtomicInteger done = new AtomicInteger();
        Workers clients = new Workers();
        clients.add(64, worker -> {
            for (int number = worker; number < count; number += 64) if (disconnected(number)) done.incrementAndGet();
        });
        clients.stop();
        report.value("disconnected", done);
    }

    private boolean disconnected(int number) {
        String post = message(newText("disconnect", String.valueOf(number)));
        String request = switch (number % 5) {
            case 0  -> post.substring(0, 31);                 // ends in the middle of the head
            case 1  -> post.substring(0, post.length() - 20); // ends in the middle of the body
            case 2  -> post;                                  // ends before the answer
            case 3  -> get("/", "Accept: text/html");         // ends in the middle of the answer
            default -> get("/api/events");                    // ends in the middle of the event stream
        };
        try (Socket socket = new Socket(sides.getFirst().getFirst(), port)) {
            socket.setSoTimeout(RESPONSE_MILLIS);
            socket.setSoLinger(true, 0); // the peer gets RST instead of FIN
            socket.getOutputStream().write(request.getBytes(UTF_8));
            return number % 5 < 3 || socket.getInputStream().read() >= 0;
        } catch (IOException e) { return false; }
    }

    /**
     * Acts as an instance for a moment (the test gives this container the name of one), and reports the headers that
     * nginx passes on from a client that claims another address.
     */
    private void spoof(Report report) throws IOException {
        HttpServer instance = HttpServer.create(new InetSocketAddress(port), 0);
        instance.createContext("/" + run, LoadClients::echoHeaders);
        instance.createContext("/", HttpExchange::close); // nginx retries at the next instance
        instance.start();
        try (Socket socket = new Socket(sides.getFirst().getFirst(), port)) {
            report.value("own", socket.getLocalAddress().getHostAddress());
            report.value("headers", read("/" + run, "X-Forwarded-For: 203.0.113.7", "X-Real-IP: 203.0.113.7",
                    "Forwarded: for=203.0.113.7", "X-Forwarded-Proto: https", "X-Proxy-Request-Id: 203.0.113.7"));
        } finally {
            instance.stop(0);
        }
    }

    private static void echoHeaders(HttpExchange exchange) throws IOException {
        byte[] headers = exchange.getRequestHeaders().entrySet().stream()
                .map(header -> header.getKey().toLowerCase() + ":" + String.join(",", header.getValue()))
                .collect(joining("|")).replace(" ", "").getBytes(UTF_8);
        exchange.sendResponseHeaders(200, headers.length);
        exchange.getResponseBody().write(headers);
        exchange.close();
    }

    // ---------------------------------------------------------------------------------------------------- HTTP

    private static String get(String path, String... headers) { return request("GET " + path, "", headers); }

    private static String message(String text, String... headers) {
        return request("POST /api/messages", "{\"author\":\"" + AUTHOR + "\",\"body\":\"" + text + "\"}", headers);
    }

    private static String request(String start, String body, String... headers) {
        return start + " HTTP/1.1\r\nHost: threefold\r\n"
                + Stream.of(headers).map(header -> header + "\r\n").collect(joining())
                + (body.isEmpty() ? "" : "Content-Type: application/json\r\nContent-Length: "
                        + body.getBytes(UTF_8).length + "\r\n") + "\r\n" + body;
    }

    /** The outcome is the status, or the reason why there is none: `time-out`, `refused` or `cut`. */
    private record Answer(String outcome, Map<String, String> headers, String body) {
        boolean isAnswered() { return !headers.isEmpty(); }
        boolean isGood() { return outcome.startsWith("2"); }
        boolean isTemporary() { return !isAnswered() || Set.of("502", "503", "504").contains(outcome); }
        boolean closes() { return "close".equalsIgnoreCase(headers.get("connection")); }
        String instance() { return headers.getOrDefault("x-instance-id", "none"); }

        @Override public String toString() {
            return outcome + " from " + instance() + " at " + LocalTime.now() + ", request "
                    + headers.get("x-request-id") + " " + body.lines().findFirst().orElse("");
        }
    }

    /** A connection on a plain socket, because an HTTP library retries requests and replaces connections silently. */
    private final class Connection implements AutoCloseable {
        private final List<String> hosts;
        private final int connectMillis;
        private int turn;
        private Socket socket;
        private InputStream in;

        Connection(List<String> hosts, int turn, int connectMillis) {
            this.hosts = hosts;
            this.turn = turn;
            this.connectMillis = connectMillis;
        }

        boolean isOpen() { return socket != null; }

        private void open() throws IOException {
            socket = new Socket();
            String host = hosts.get(turn % hosts.size());
            socket.connect(new InetSocketAddress(InetAddress.getByName(host), port), connectMillis);
            socket.setSoTimeout(RESPONSE_MILLIS);
            socket.setTcpNoDelay(true);
            in = new BufferedInputStream(socket.getInputStream());
        }

        /** After a failure the connection is closed, and the next one goes to the next host. */
        Answer exchange(String request) {
            String failure = "refused";
            try {
                if (!isOpen()) open();
                failure = "cut";
                socket.getOutputStream().write(request.getBytes(UTF_8));
                Answer answer = readAnswer();
                if (answer.closes()) close();
                return answer;
            } catch (IOException e) {
                close();
                turn++;
                return new Answer(e instanceof SocketTimeoutException ? "time-out" : failure, Map.of(), e.toString());
            }
        }

        private Answer readAnswer() throws IOException {
            String status = readLine();
            Map<String, String> headers = new HashMap<>();
            for (String line; !(line = readLine()).isEmpty(); ) {
                String[] header = line.split(": *", 2);
                headers.put(header[0].toLowerCase(), header[1]);
            }
            if (!headers.containsKey("content-length")) throw new IOException("no Content-Length after " + status);
            int length = Integer.parseInt(headers.get("content-length"));
            byte[] body = in.readNBytes(length);
            if (body.length < length) throw new EOFException("closed in the middle of the body");
            return new Answer(status.split(" ")[1], headers, new String(body, UTF_8));
        }

        private String readLine() throws IOException {
            StringBuilder line = new StringBuilder();
            for (int c; (c = in.read()) != '\n'; line.append((char) c))
                if (c < 0) throw new EOFException("closed after \"" + line + "\"");
            return line.toString().strip();
        }

        @Override public void close() {
            try {
                if (socket != null) socket.close();
            } catch (IOException e) { /* closed either way */ }
            socket = null;
        }
    }

    // ------------------------------------------------------------------------------------------ Threads and time

    /** Threads that work until they are stopped. */
    private static final class Workers {
        private final ExecutorService threads = Executors.newCachedThreadPool();
        private final List<Future<?>> tasks = new ArrayList<>();
        volatile boolean running = true;

        void add(int count, IntConsumer work) {
            IntStream.range(0, count).forEach(number -> tasks.add(threads.submit(() -> work.accept(number))));
        }

        void stop() throws Exception {
            running = false;
            threads.close();
            for (Future<?> task : tasks) task.get(); // an unexpected exception ends this program
        }
    }

    private static long now() { return System.nanoTime() / 1_000_000; }

    private static void pause(long millis) {
        try {
            Thread.sleep(Math.max(0, millis));
        } catch (InterruptedException e) { throw new IllegalStateException(e); }
    }

    /** The longest time that this machine kept a thread from running: a measured time may be too long by it. */
    private volatile long longestStall;

    private void watchStalls() {
        for (long before = now(); ; before = now()) {
            pause(10);
            longestStall = Math.max(longestStall, now() - before - 10);
        }
    }
}
