import java.io.BufferedInputStream;
import java.io.BufferedReader;
import java.io.ByteArrayOutputStream;
import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.net.ConnectException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.NoRouteToHostException;
import java.net.ServerSocket;
import java.net.Socket;
import java.net.SocketTimeoutException;
import java.net.UnknownHostException;
import java.security.Security;
import java.time.LocalTime;
import java.time.temporal.ChronoUnit;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentSkipListMap;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * The clients of tests/stack/failover. They load the stack through nginx while its parts stop, die and hang; know of
 * every request whether it was answered, refused or left open; and read everything back at the end, as Jepsen does:
 *
 * <pre>
 *   lost        acknowledged, and not there at the end, or there with another id
 *   doubled     one text stored twice
 *   unexpected  there, though no client of this run ever sent it
 *   unknown     sent and not answered: may be there or not, but once at most
 * </pre>
 *
 * {@code java LoadClients.java HOST PORT RUN} reads commands from standard input (see {@link #command}) and ends with
 * it; each is answered by lines and then a line with a dot. JDK 21 and nothing else. Plain blocking sockets and a
 * thread a client, because an HTTP library would repeat requests and replace connections without telling.
 */
public final class LoadClients {

    // ------------------------------------------------------------------------------------------- Entry point

    public static void main(String[] args) throws Exception {
        Security.setProperty("networkaddress.cache.ttl", "0"); // nginx may come back with another address
        Security.setProperty("networkaddress.cache.negative.ttl", "0");
        LoadClients load = new LoadClients(args[0], Integer.parseInt(args[1]), args[2]);
        BufferedReader commands = new BufferedReader(new InputStreamReader(System.in, UTF_8));
        for (String line; (line = commands.readLine()) != null; ) {
            String answer;
            try {
                answer = load.command(line.split(" "));
            } catch (IOException e) {
                answer = "error=1\n- the clients could not go on: " + e;
            }
            System.out.println(answer + "\n.");
        }
    }

    private String command(String[] words) throws Exception {
        return switch (words[0]) {
            case "hello"       -> "hello";
            case "via"         -> via(words);           // from now on through these hosts
            case "start"       -> start(words[1], Mode.valueOf(words[2]));
            case "mark"        -> mark();               // what was broken is well again: measure from here
            case "seen"        -> "instances=" + tally.answeredSince(now() - 1_000);
            case "count"       -> "acknowledged=" + tally.acknowledged(); // what nobody may lose, so far
            case "others"      -> others(Integer.parseInt(words[1])); // so many visits are not ours
            case "stop"        -> stop();
            case "everything"  -> everything();         // what the whole run stored, read back once more
            case "direct"      -> direct(words[1]);     // ask an instance without nginx, while it leaves
            case "direct-stop" -> directStop();
            case "flood"       -> flood(Integer.parseInt(words[1]));
            case "flood-stop"  -> floodStop();
            case "slow"        -> slow(Integer.parseInt(words[1]));
            case "slow-stop"   -> slowStop();
            case "hang-up"     -> hangUp(Integer.parseInt(words[1]));
            case "forwarded"   -> forwarded();          // what an instance is told about a client that lies
            default -> throw new IllegalArgumentException(words[0]);
        };
    }

    // -------------------------------------------------------------------------------------------------- Setup

    /** A dozen clients with a request each 30 ms: 400 a second. */
    private static final int CLIENTS = 12, PERIOD_MILLIS = 30;
    /** How long a client waits for one answer, and how long it goes on repeating one request. */
    private static final int READ_MILLIS = 10_000, PATIENCE_MILLIS = Integer.getInteger("patience", 20) * 1_000;
    private static final String AUTHOR = "test-failover";
    /** Outside ASCII, so that text damaged on the way is text lost. */
    private static final String TAIL = " \u00fc\u2603";

    /** What the clients do about a request that fails. */
    enum Mode {
        /** Nothing, and every failure counts: a planned change needs no repeat at all. */
        planned,
        /** The same; but an instance may have died or hung after counting a visit whose answer it never gave. */
        once,
        /** They repeat it, under the same Idempotency-Key; one in four has no key and leaves it at that. */
        repeat
    }

    private final String run;
    private final int port;
    private String host;              // or several, joined by commas: who finds one closed takes the next
    private List<String> sides;       // what `host` is for the first client, for the second, and so on in turns
    private final Ledger ledger = new Ledger();
    private final List<Client> clients = new ArrayList<>();
    private final StallWatch stalls = new StallWatch();
    private Tally tally;
    private int cases;
    private long newestBefore, visitsBefore;
    private volatile boolean running;

    private LoadClients(String host, int port, String run) {
        this.host = host;
        this.sides = List.of(host);
        this.port = port;
        this.run = run;
        stalls.start();
    }

    /** Hosts, joined by commas, or several such lists: then each client belongs to one side. */
    private String via(String[] words) {
        sides = List.of(words).subList(1, words.length);
        host = sides.getFirst();
        return "via=" + host;
    }

    // --------------------------------------------------------------------------------------------------- Load

    private String start(String name, Mode mode) throws Exception {
        newestBefore = newestId();
        visitsBefore = visitsTotal();
        stalls.longest = 0;
        tally = new Tally(name + "." + ++cases, mode); // a case may be run twice
        running = true;
        clients.clear();
        for (int i = 0; i < CLIENTS; i++) clients.add(new Client(i));
        clients.forEach(Thread::start);
        awaitAnswers();
        return "started";
    }

    /** A second of load, or on a busy machine as much load as that; not for ever, if there are no answers. */
    private void awaitAnswers() {
        int enough = tally.good() + CLIENTS * 1_000 / PERIOD_MILLIS;
        for (long giveUp = now() + READ_MILLIS; tally.good() < enough && now() < giveUp; ) pause(20);
    }

    private String mark() {
        tally.marked = now();
        return "marked";
    }

    private String others(int visits) {
        tally.visitsOfOthers += visits;
        return "others=" + tally.visitsOfOthers;
    }

    /** Ends the load, reads back what it stored, and says how it went: `name=value` words, then details. */
    private String stop() throws Exception {
        awaitAnswers();
        running = false;
        for (Client client : clients) client.join();
        tally.ended = now();
        String how = tally.report() + " stall=" + stalls.longest;
        try {
            Findings findings = ledger.compare(tally.name + "/", readBack(newestBefore));
            findings.counting.addAll(countingErrors(visitsTotal()));
            return how + " " + findings.report() + tally.details() + findings.details();
        } catch (IOException e) {
            return how + " lost=? doubled=?" + tally.details() + "\n- what was stored can't be read back: "
                    + e.getMessage();
        }
    }

    private String everything() throws IOException {
        Findings findings = ledger.compare("", readBack(ledger.oldest()));
        return "messages=" + ledger.acknowledged.size() + " unknown=" + ledger.unknown() + " "
                + findings.report() + findings.details();
    }

    /** The counter lies between what was acknowledged and what was tried, and is not lower than anyone was told. */
    private List<String> countingErrors(long total) {
        List<String> errors = new ArrayList<>(tally.countingErrors);
        long counted = total - visitsBefore;
        // A visit that an instance counted before it died is counted again by the next one that nginx asks: at each
        // moment a client has one request under way, and no case breaks instances more than three times.
        int countedTwice = tally.mode == Mode.planned ? 0 : 3 * CLIENTS;
        if (counted < tally.visitsTold) errors.add(counted + " visits counted, " + tally.visitsTold + " acknowledged");
        if (counted > tally.visitsTried + tally.visitsOfOthers + countedTwice)
            errors.add(counted + " visits counted, " + (tally.visitsTried + tally.visitsOfOthers) + " attempted");
        if (total < ledger.highestVisit) errors.add("total " + total + ", a client was told " + ledger.highestVisit);
        return errors;
    }

    /** One user: a keep-alive connection, and one request after the other. */
    private final class Client extends Thread {
        private final int number;
        private final boolean keyless, repeats;
        private final Connection connection;
        private long lastVisit, ownMessage;
        private String ownText;

        Client(int number) {
            this.number = number;
            // Without repeats every second client has no key; with them every fourth, and that one doesn't repeat.
            keyless = number % (tally.mode == Mode.repeat ? 4 : 2) == 1;
            repeats = tally.mode == Mode.repeat && !keyless;
            int connectMillis = tally.mode == Mode.repeat || host.contains(",") ? 1_000 : READ_MILLIS;
            connection = new Connection(sides.get(number % sides.size()), port, connectMillis);
        }

        @Override public void run() {
            pause(number * PERIOD_MILLIS / CLIENTS);
            for (int n = 0; running; n++) {
                long next = now() + PERIOD_MILLIS;
                switch (n % 6) {
                    case 0, 3 -> post(n);
                    case 1, 4 -> visit("application/json", VISIT_JSON);
                    case 2 -> send(new Request("GET", "/api/messages?limit=20"));
                    default -> { if (n % 12 == 5) visit("text/html", VISIT_HTML); else readOwn(); }
                }
                pause(next - now());
            }
            connection.close();
        }

        private void post(int n) {
            String text = run + "/" + tally.name + "/" + number + "-" + n + TAIL;
            ledger.attempted.add(text);
            Request request = new Request("POST", "/api/messages").header("Content-Type", "application/json")
                    .body("{\"author\":\"" + AUTHOR + "\",\"body\":\"" + text + "\"}");
            if (!keyless) request.header("Idempotency-Key", run + "." + tally.name + "." + number + "." + n);
            Answer answer = send(request);
            if (answer == null) return;
            Matcher stored = STORED.matcher(answer.body);
            if (!stored.find() || !stored.group(2).equals(text)) {
                tally.failed(request, "answered with another message: " + answer.body);
                return;
            }
            tally.messageStored();
            ownMessage = Long.parseLong(stored.group(1));
            ownText = text;
            ledger.acknowledged.put(text, ownMessage);
        }

        /** What was acknowledged can be read at once, whichever instance stored it and whichever is asked. */
        private void readOwn() {
            if (ownText == null) return;
            Request request = new Request("GET", "/api/messages/" + ownMessage);
            Answer answer = send(request);
            if (answer != null && !answer.body.contains('"' + ownText + '"'))
                tally.failed(request, "expected \"" + ownText + "\", saw " + answer.body);
        }

        private void visit(String accept, Pattern number) {
            Answer answer = send(new Request("GET", "/").header("Accept", accept));
            Matcher told = answer == null ? null : number.matcher(answer.body);
            if (told == null || !told.find()) return;
            long visit = Long.parseLong(told.group(1));
            tally.visitTold();
            if (visit <= lastVisit) tally.countingError("visit " + visit + " came after " + lastVisit);
            if (!ledger.visit(visit)) tally.countingError("visit " + visit + " was told twice");
            lastVisit = visit;
        }

        /** @return the answer if it was a good one, else null; without repeats (see Mode) after one try */
        private Answer send(Request request) {
            long giveUp = now() + PATIENCE_MILLIS;
            for (int wait = 50; ; wait = Math.min(400, 2 * wait)) {
                Attempt attempt = attempt(request);
                if (attempt.isGood()) return attempt.answer;
                if (!repeats || !attempt.mayBeRepeated() || now() > giveUp) {
                    if (!keyless || tally.mode != Mode.repeat || !attempt.mayBeRepeated())
                        tally.failed(request, attempt.toString());
                    return null;
                }
                pause(wait);
            }
        }

        private Attempt attempt(Request request) {
            long began = now();
            Attempt attempt;
            try {
                attempt = new Attempt(connection.exchange(request), null, began, now());
            } catch (IOException e) {
                connection.close();
                attempt = new Attempt(null, e, began, now());
            }
            tally.add(request, attempt);
            if (attempt.isUnkind()) tally.failed(request, attempt + " (it does not say when to come again)");
            return attempt;
        }
    }

    private static final Pattern STORED = Pattern.compile(
            "\"id\":(\\d+),\"author\":\"" + AUTHOR + "\",\"body\":\"([^\"\\\\]*)\"");
    private static final Pattern VISIT_JSON = Pattern.compile("\"visits\":(\\d+)");
    private static final Pattern VISIT_HTML = Pattern.compile("id=\"visit\">Visit (\\d+)<");

    /** One try of one request: an answer, or why there is none. */
    private record Attempt(Answer answer, IOException failure, long began, long ended) {
        boolean isGood() { return answer != null && answer.status / 100 == 2; }

        /** A 4xx will be the same the next time, and 500 is not an answer to anything. */
        boolean mayBeRepeated() { return answer == null || answer.status >= 502 && answer.status <= 504; }

        /** Refused for now, and not told for how long. */
        boolean isUnkind() {
            return answer != null && (answer.status == 503 || answer.status == 429)
                    && answer.header("retry-after").equals("(none)");
        }

        /** Good, but a part of it is missing: Redis is away, the visit was not counted. */
        boolean isDegraded() { return isGood() && answer.body.endsWith("\"visits\":null}"); }

        String outcome() {
            if (answer != null) return Integer.toString(answer.status);
            if (failure instanceof SocketTimeoutException) return "time-out";
            if (failure instanceof UnknownHostException || failure instanceof ConnectException
                    || failure instanceof NoRouteToHostException) return "refused";
            return "cut";
        }

        @Override public String toString() {
            String time = LocalTime.now().truncatedTo(ChronoUnit.MILLIS) + " after " + (ended - began) + " ms: ";
            return time + (answer == null ? failure.toString() : answer.status + " from "
                    + answer.header("x-instance-id")
                    + ", request " + answer.header("x-request-id") + " " + answer.body.lines().findFirst().orElse(""));
        }
    }

    // ----------------------------------------------------------------------------------------------- Evidence

    /** What happened during one case, as the clients saw it. */
    private static final class Tally {
        final String name;
        final Mode mode;
        private final Map<String, Integer> outcomes = new TreeMap<>();
        private final Map<String, Long> lastAnswerOf = new TreeMap<>();
        private final List<String> failures = new ArrayList<>(), countingErrors = new ArrayList<>();
        private final long began = now();
        private int posts, visits, reads, good, stored;
        private long slowest, lastGood = began, longestGap, lastBad;
        private long lastStored = began, withoutStoring, lastTold = began, withoutCounting;
        int visitsTried, visitsTold, visitsOfOthers;
        volatile long marked = Long.MAX_VALUE;
        long ended;

        Tally(String name, Mode mode) {
            this.name = name;
            this.mode = mode;
        }

        synchronized void add(Request request, Attempt attempt) {
            if (request.method.equals("POST")) posts++;
            else if (request.path.equals("/")) visits++;
            else reads++;
            visitsTried = visits;
            outcomes.merge(attempt.outcome(), 1, Integer::sum);
            if (attempt.answer != null) {
                slowest = Math.max(slowest, attempt.ended - attempt.began);
                lastAnswerOf.put(attempt.answer.header("x-instance-id"), attempt.ended);
            }
            if (attempt.isGood()) {
                good++;
                longestGap = Math.max(longestGap, attempt.ended - lastGood);
                lastGood = attempt.ended;
            }
            if (!attempt.isGood() || attempt.isDegraded()) lastBad = attempt.ended;
        }

        synchronized int good() { return good; }
        synchronized int acknowledged() { return stored + visitsTold; }

        synchronized void messageStored() {
            stored++;
            withoutStoring = Math.max(withoutStoring, now() - lastStored);
            lastStored = now();
        }
        synchronized void failed(Request request, String how) { failures.add(request + " at " + how); }
        synchronized void visitTold() {
            visitsTold++;
            withoutCounting = Math.max(withoutCounting, now() - lastTold);
            lastTold = now();
        }

        synchronized void countingError(String error) { countingErrors.add(error); }

        /** How many different instances did. */
        synchronized long answeredSince(long time) {
            return lastAnswerOf.values().stream().filter(last -> last >= time).count();
        }

        /** `back`: from the mark until the last request that was still refused; the end, if none was good after it. */
        synchronized String report() {
            long back = lastGood < marked || lastGood < lastBad ? ended - marked : Math.max(0, lastBad - marked);
            String answers = outcomes.toString().replaceAll("[{} ]", "").replace('=', ':');
            return "sent=" + (posts + visits + reads) + " posts=" + posts + " visits=" + visits + " reads=" + reads
                    + " rate=" + (posts + visits + reads) * 1000L / Math.max(1, ended - began)
                    + " outcomes=" + answers + " failed=" + failures.size() + " slowest=" + slowest
                    + " gap=" + Math.max(longestGap, ended - lastGood)
                    + " without-storing=" + Math.max(withoutStoring, ended - lastStored)
                    + " without-counting=" + Math.max(withoutCounting, ended - lastTold)
                    + (marked > ended ? "" : " back=" + back);
        }

        String details() { return Findings.lines("failed", failures); }
    }

    /** What was sent and acknowledged in the whole run, by all clients. */
    private static final class Ledger {
        final Set<String> attempted = ConcurrentHashMap.newKeySet();
        final Map<String, Long> acknowledged = new ConcurrentSkipListMap<>();
        private final Set<Long> visitsTold = ConcurrentHashMap.newKeySet();
        volatile long highestVisit;

        /** @return false if this number was given before */
        synchronized boolean visit(long number) {
            highestVisit = Math.max(highestVisit, number);
            return visitsTold.add(number);
        }

        long oldest() { return acknowledged.values().stream().min(Long::compare).orElse(1L) - 1; }
        int unknown() { return attempted.size() - acknowledged.size(); }

        /** Compares what was acknowledged, of the texts that contain this part, with what is there. */
        Findings compare(String part, List<Stored> found) {
            Findings findings = new Findings();
            Map<String, Long> byText = new HashMap<>();
            Map<Long, String> byId = new HashMap<>();
            for (Stored message : found) {
                if (byText.put(message.text, message.id) != null) findings.doubled.add(message.toString());
                if (byId.put(message.id, message.text) != null) findings.ids.add(message.toString());
                if (!attempted.contains(message.text)) findings.unexpected.add(message.toString());
            }
            acknowledged.forEach((text, id) -> {
                if (text.contains(part) && !id.equals(byText.get(text)))
                    findings.lost.add(id + " " + text + " (there: " + byText.get(text) + ")");
            });
            return findings;
        }
    }

    private record Stored(long id, String text) {}

    /** What is wrong with what is there. */
    private static final class Findings {
        final List<String> lost = new ArrayList<>(), doubled = new ArrayList<>(), unexpected = new ArrayList<>(),
                ids = new ArrayList<>(), counting = new ArrayList<>();

        String report() {
            return "lost=" + lost.size() + " doubled=" + doubled.size() + " unexpected=" + unexpected.size()
                    + " ids=" + ids.size() + " counting=" + counting.size();
        }

        String details() {
            return lines("lost", lost) + lines("doubled", doubled) + lines("unexpected", unexpected)
                    + lines("id given twice", ids) + lines("counting", counting);
        }

        static String lines(String what, List<String> all) {
            StringBuilder lines = new StringBuilder();
            all.stream().limit(5).forEach(one -> lines.append("\n- ").append(what).append(": ").append(one));
            return lines.toString();
        }
    }

    // ----------------------------------------------------------------------------------------------- Read back

    private long newestId() throws IOException {
        Matcher id = Pattern.compile("^\\{\"messages\":\\[\\{\"id\":(\\d+)").matcher(get("/api/messages?limit=1"));
        return id.find() ? Long.parseLong(id.group(1)) : 0;
    }

    private long visitsTotal() throws IOException {
        Matcher total = Pattern.compile("^\\{\"total\":(\\d+)").matcher(get("/api/visits"));
        if (!total.find()) throw new IOException("no total at /api/visits");
        return Long.parseLong(total.group(1));
    }

    /** This run's messages with an id above {@code floor}. */
    private List<Stored> readBack(long floor) throws IOException {
        List<Stored> found = new ArrayList<>();
        Pattern next = Pattern.compile("\"next\":\"([^\"]*before=(\\d+)[^\"]*)\"");
        for (String path = "/api/messages?limit=100"; path != null; ) {
            String page = get(path);
            for (Matcher m = STORED.matcher(page); m.find(); )
                if (Long.parseLong(m.group(1)) > floor && m.group(2).startsWith(run + "/"))
                    found.add(new Stored(Long.parseLong(m.group(1)), m.group(2)));
            Matcher older = next.matcher(page);
            path = older.find() && Long.parseLong(older.group(2)) > floor ? older.group(1) : null;
        }
        return found;
    }

    /** A read that is not part of the load: repeated for as long as a case may take to recover. */
    private String get(String path) throws IOException {
        Connection connection = new Connection(host, port, 1_000);
        for (long giveUp = now() + PATIENCE_MILLIS; ; pause(100)) {
            try {
                Answer answer = connection.exchange(new Request("GET", path));
                if (answer.status == 200) {
                    connection.close();
                    return answer.body;
                }
                if (now() > giveUp) throw new IOException("GET " + path + ": " + answer.status + " " + answer.body);
            } catch (IOException e) {
                connection.close();
                if (now() > giveUp) throw e;
            }
        }
    }

    // ---------------------------------------------------------------------------- One instance, as it leaves

    private final List<Direct> directs = new ArrayList<>();
    private volatile boolean directing;

    /** Ten connections as nginx keeps them: used again after 0.1 to 1.9 s, unless the instance said otherwise. */
    private String direct(String instance) {
        directs.clear();
        directing = true;
        for (int i = 0; i < 10; i++) directs.add(new Direct(instance, 100 + 200 * i));
        directs.forEach(Thread::start);
        return "started";
    }

    private String directStop() throws InterruptedException {
        directing = false;
        for (Direct direct : directs) direct.join();
        List<String> cut = directs.stream().filter(d -> d.cut != null).map(d -> "idle " + d.idle + " ms: " + d.cut)
                .toList();
        long firstTold = directs.stream().mapToLong(d -> d.firstTold).filter(time -> time > 0).min().orElse(0);
        long lastAnswer = directs.stream().mapToLong(d -> d.lastAnswer).max().orElse(0);
        return "answered=" + directs.stream().mapToInt(d -> d.answered).sum() + " cut=" + cut.size()
                + " asked-to-go=" + directs.stream().filter(d -> d.firstTold > 0).count()
                + " leaving=" + (firstTold == 0 ? 0 : lastAnswer - firstTold) + Findings.lines("cut", cut);
    }

    private final class Direct extends Thread {
        private final String instance;
        private final int idle;
        private int answered;
        private long firstTold, lastAnswer;
        private String cut;

        Direct(String instance, int idle) {
            this.instance = instance;
            this.idle = idle;
        }

        /**
         * Until the port is closed. To be refused is fair, and so is a reset of a connection that was just opened (it
         * waited in the queue when the port closed); to be cut off on one that was kept, and not asked to go, is not.
         */
        @Override public void run() {
            Connection connection = new Connection(instance, port, 1_000);
            for (; directing; pause(idle)) {
                boolean kept = connection.isOpen();
                try {
                    connection.open();
                } catch (IOException refused) {
                    return;
                }
                try {
                    Answer answer = connection.exchange(new Request("GET", "/api/messages?limit=1"));
                    answered++;
                    lastAnswer = now();
                    if (answer.closes() && firstTold == 0) firstTold = lastAnswer;
                } catch (IOException e) {
                    if (kept) cut = e.toString();
                    return;
                }
            }
            connection.close();
        }
    }

    // ---------------------------------------------------------------------------------------- As fast as it goes

    private final List<Thread> floods = new ArrayList<>();
    private final List<String> floodFailures = Collections.synchronizedList(new ArrayList<>());
    private final AtomicInteger floodAnswers = new AtomicInteger();
    private volatile boolean flooding;
    private long floodBegan;

    /** So many clients beside the others, who never pause and ask ten at a time, for nothing that is stored. */
    private String flood(int count) {
        floods.clear();
        floodFailures.clear();
        floodAnswers.set(0);
        floodBegan = now();
        flooding = true;
        for (int i = 0; i < count; i++) floods.add(Thread.ofPlatform().start(this::flood));
        return "started";
    }

    private void flood() {
        Connection connection = new Connection(host, port, READ_MILLIS);
        String ten = new Request("GET", "/healthz").head(host).repeat(10);
        while (flooding) {
            try {
                connection.write(ten);
                for (int i = 0; i < 10; i++) {
                    Answer answer = connection.readAnswer();
                    if (answer.status == 200) floodAnswers.incrementAndGet();
                    else floodFailures.add(answer.status + " " + answer.body);
                }
            } catch (IOException e) {
                connection.close();
                floodFailures.add(e.toString());
            }
        }
        connection.close();
    }

    private String floodStop() throws InterruptedException {
        flooding = false;
        for (Thread flood : floods) flood.join();
        return "flood=" + floodAnswers.get() * 1_000L / (now() - floodBegan) + " flood-failed=" + floodFailures.size()
                + Findings.lines("failed", floodFailures);
    }

    // ----------------------------------------------------------------------------------------- Hostile clients

    private final List<Connection> slow = new ArrayList<>();
    private Thread dribbler;

    /** So many clients that begin a request and send a byte of it each half second. */
    private String slow(int count) throws IOException {
        for (int i = 0; i < count; i++) {
            Connection connection = new Connection(host, port, READ_MILLIS);
            connection.write("POST /api/messages HTTP/1.1\r\nHost: " + host + "\r\nX-Slow: ");
            slow.add(connection);
        }
        dribbler = new Thread(() -> {
            while (!Thread.currentThread().isInterrupted()) {
                slow.forEach(connection -> {
                    try {
                        connection.write("z");
                    } catch (IOException e) { /* nginx had enough of it, as it should */ }
                });
                if (!pause(500)) return;
            }
        });
        dribbler.start();
        return "started";
    }

    /** Tells how many of them are still there. */
    private String slowStop() throws InterruptedException {
        dribbler.interrupt();
        dribbler.join();
        long open = slow.stream().filter(connection -> !connection.wasClosedByPeer()).count();
        slow.forEach(Connection::close);
        slow.clear();
        return "open=" + open;
    }

    /** So many clients, 64 at a time, that go away without a word in the middle of something. */
    private String hangUp(int count) throws InterruptedException {
        AtomicInteger left = new AtomicInteger(count), done = new AtomicInteger();
        List<Thread> threads = new ArrayList<>();
        for (int i = 0; i < 64; i++) threads.add(Thread.ofPlatform().start(() -> {
            for (int n; (n = left.decrementAndGet()) >= 0; ) {
                try {
                    hangUpOnce(n);
                    done.incrementAndGet();
                } catch (IOException e) { /* counted by not being counted */ }
            }
        }));
        for (Thread thread : threads) thread.join();
        return "hung-up=" + done;
    }

    private void hangUpOnce(int n) throws IOException {
        Connection connection = new Connection(host, port, READ_MILLIS);
        String text = run + "/hang-up/" + n + TAIL, json = "{\"author\":\"" + AUTHOR + "\",\"body\":\"" + text + "\"}";
        ledger.attempted.add(text);
        Request post = new Request("POST", "/api/messages").header("Content-Type", "application/json").body(json);
        switch (n % 5) {
            case 0 -> connection.write("GET / HTTP/1.1\r\nHo");                       // in the middle of the head
            case 1 -> connection.write(post.head(host) + json.substring(0, 20));      // in the middle of the body
            case 2 -> connection.write(post.head(host) + json);                       // before the answer
            case 3 -> {                                                               // in the middle of the answer
                connection.write(new Request("GET", "/").header("Accept", "text/html").head(host));
                connection.readByte();
            }
            default -> {                                                              // of a stream that has no end
                connection.write(new Request("GET", "/api/events").head(host));
                connection.readByte();
            }
        }
        connection.reset();
    }

    // ------------------------------------------------------------------------- What an instance is told of us

    /**
     * This container answers as one more instance for a moment (tests/stack/failover gives it the name web-extra on the
     * backend network), and tells what nginx passes on of a client that claims to be someone else.
     */
    private String forwarded() throws Exception {
        String path = "/" + run;
        Request lie = new Request("GET", path).header("X-Forwarded-For", "203.0.113.7")
                .header("X-Real-IP", "203.0.113.7")
                .header("Forwarded", "for=203.0.113.7").header("X-Forwarded-Proto", "https")
                .header("X-Proxy-Request-Id", "203.0.113.7");
        try (ServerSocket listener = new ServerSocket(port)) {
            Thread.ofPlatform().daemon().start(() -> echo(listener, path));
            Connection connection = new Connection(host, port, READ_MILLIS);
            for (long giveUp = now() + 10_000; now() < giveUp; pause(50)) {
                Answer answer = connection.exchange(lie);
                if (answer.status == 200) return "told=" + answer.body.replace("\r\n", "|").replace(" ", "")
                        + " own=" + connection.ownAddress();
            }
            return "told=nothing";
        }
    }

    /** Answers requests for one path with their own head, and hangs up on others,
            which nginx then gives to the next. */
    private static void echo(ServerSocket listener, String path) {
        while (!listener.isClosed()) {
            try (Socket socket = listener.accept()) {
                String head = Connection.readHead(new BufferedInputStream(socket.getInputStream()));
                if (!head.startsWith("GET " + path + " ")) continue;
                String body = head.substring(head.indexOf("\r\n") + 2).toLowerCase();
                socket.getOutputStream().write(("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: "
                        + body.length()
                        + "\r\n\r\n" + body).getBytes(UTF_8));
            } catch (IOException e) { /* that one is gone; or we are done */ }
        }
    }

    // --------------------------------------------------------------------------------------------------- HTTP

    private static final class Request {
        final String method, path;
        private final StringBuilder headers = new StringBuilder();
        private byte[] body = {};

        Request(String method, String path) {
            this.method = method;
            this.path = path;
        }

        Request header(String name, String value) {
            headers.append(name).append(": ").append(value).append("\r\n");
            return this;
        }

        Request body(String text) {
            body = text.getBytes(UTF_8);
            return header("Content-Length", Integer.toString(body.length));
        }

        String head(String host) { return method + " " + path + " HTTP/1.1\r\nHost: " + host + "\r\n" + headers
                + "\r\n"; }

        @Override public String toString() { return method + " " + path; }
    }

    private record Answer(int status, Map<String, String> headers, String body) {
        String header(String name) { return headers.getOrDefault(name, "(none)"); }
        boolean closes() { return header("connection").equalsIgnoreCase("close"); }
    }

    /**
     * One connection, opened when needed; what happens on it is told to the caller and never mended here. Only where
     * there are several hosts, one that can't be connected to is passed over, as a browser does with several addresses.
     */
    private static final class Connection {
        private static final AtomicInteger TURNS = new AtomicInteger();
        private final String[] hosts;
        private final int port, connectMillis;
        private String host;
        private int turn = TURNS.getAndIncrement();
        private Socket socket;
        private InputStream in;

        Connection(String hosts, int port, int connectMillis) {
            this.hosts = hosts.split(",");
            this.host = this.hosts[turn % this.hosts.length];
            this.port = port;
            this.connectMillis = connectMillis;
        }

        void open() throws IOException {
            if (socket != null) return;
            for (int left = hosts.length; ; host = hosts[++turn % hosts.length]) {
                try {
                    connect();
                    return;
                } catch (IOException e) {
                    if (--left == 0) throw e;
                }
            }
        }

        private void connect() throws IOException {
            Socket opening = new Socket();
            try {
                opening.connect(new InetSocketAddress(InetAddress.getByName(host), port), connectMillis);
                opening.setSoTimeout(READ_MILLIS);
                opening.setTcpNoDelay(true);
            } catch (IOException e) {
                opening.close();
                throw e;
            }
            socket = opening;
            in = new BufferedInputStream(socket.getInputStream());
        }

        Answer exchange(Request request) throws IOException {
            open();
            ByteArrayOutputStream bytes = new ByteArrayOutputStream();
            bytes.writeBytes(request.head(host).getBytes(UTF_8));
            bytes.writeBytes(request.body);
            socket.getOutputStream().write(bytes.toByteArray());
            Answer answer = readAnswer();
            if (answer.closes()) close();
            return answer;
        }

        private Answer readAnswer() throws IOException {
            String[] lines = readHead(in).split("\r\n");
            Map<String, String> headers = new HashMap<>();
            for (int i = 1; i < lines.length; i++) {
                int colon = lines[i].indexOf(':');
                headers.put(lines[i].substring(0, colon).toLowerCase(), lines[i].substring(colon + 1).strip());
            }
            int length = Integer.parseInt(headers.getOrDefault("content-length", "-1"));
            if (length < 0) throw new IOException("an answer without Content-Length: " + lines[0]);
            byte[] body = in.readNBytes(length);
            if (body.length < length) throw new EOFException("cut off in the middle of the answer");
            return new Answer(Integer.parseInt(lines[0].split(" ")[1]), headers, new String(body, UTF_8));
        }

        /** Up to the empty line. */
        static String readHead(InputStream in) throws IOException {
            StringBuilder head = new StringBuilder();
            while (head.length() < 4 || head.lastIndexOf("\r\n\r\n") != head.length() - 4) {
                int next = in.read();
                if (next < 0) throw new EOFException(head.isEmpty() ? "closed without an answer"
                        : "cut off in the head");
                head.append((char) next);
            }
            return head.toString();
        }

        void write(String text) throws IOException {
            open();
            socket.getOutputStream().write(text.getBytes(UTF_8));
        }

        void readByte() throws IOException {
            if (in.read() < 0) throw new EOFException();
        }

        /** Nothing left to read but the end, or not even that. */
        boolean wasClosedByPeer() {
            try {
                socket.setSoTimeout(200);
                while (in.read() >= 0) { /* an answer, such as 408 */ }
                return true;
            } catch (SocketTimeoutException e) {
                return false;
            } catch (IOException e) {
                return true;
            }
        }

        boolean isOpen() { return socket != null; }
        String ownAddress() { return socket.getLocalAddress().getHostAddress(); }

        /** Closes without the usual good-bye: the other side sees a reset. */
        void reset() throws IOException {
            socket.setSoLinger(true, 0);
            close();
        }

        void close() {
            try {
                if (socket != null) socket.close();
            } catch (IOException e) { /* it is gone either way */ }
            socket = null;
        }
    }

    // --------------------------------------------------------------------------------------------------- Time

    private static long now() { return System.nanoTime() / 1_000_000; }

    /** @return false if this thread was asked to end */
    private static boolean pause(long millis) {
        try {
            Thread.sleep(Math.max(0, millis));
            return true;
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            return false;
        }
    }

    /** How long this machine kept us from running: a time we measure may be longer by so much than it really was. */
    private static final class StallWatch extends Thread {
        volatile long longest;

        StallWatch() { setDaemon(true); }

        @Override public void run() {
            for (long before = now(); pause(10); before = now()) longest = Math.max(longest, now() - before - 10);
        }
    }
}
