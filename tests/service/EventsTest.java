import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

import java.io.*;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.sql.Connection;
import java.sql.Statement;
import java.time.Duration;
import java.util.*;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;
import java.util.stream.IntStream;

import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.*;

/** The event stream: subscribers of every instance receive all events, and after a reconnect those that they missed. */
@ExtendWith(LogCapture.class)
class EventsTest {
    private static final Comparator<Cursor> ORDER = Comparator.comparingLong(Cursor::tx).thenComparingLong(Cursor::id);
    private static final String INSERT = "INSERT INTO messages (author, body, instance, request_key) ";

    /** One event as a browser gets it. */
    record Event(String name, String id, String data) {
        JsonObject json() { return JsonParser.parseString(data).getAsJsonObject(); }
        long message() { return json().get("id").getAsLong(); }

        /** Its id, which names the message as well. */
        Cursor cursor() {
            Cursor cursor = Cursor.parse(id);
            assertEquals(name.equals("message") ? message() : cursor.id(), cursor.id(), "the id of " + this);
            return cursor;
        }
    }

    /** An open stream; it collects the events, and remembers the last id as a browser does. */
    static final class Subscriber implements AutoCloseable {
        final HttpResponse<InputStream> response;
        private final List<Event> events = new ArrayList<>();
        private volatile boolean ended;
        private volatile int lines;
        private volatile String lastId;

        Subscriber(Caller instance, String query, String... headers) throws Exception {
            HttpRequest.Builder request = HttpRequest.newBuilder(instance.uri("/api/events" + query))
                    .header("Accept", "text/event-stream");
            if (headers.length > 0) request.headers(headers);
            response = Caller.CLIENT.send(request.build(), HttpResponse.BodyHandlers.ofInputStream());
            Thread.ofVirtual().start(this::read);
            Wait.until("the stream has begun", () -> lines > 0); // the instance counts the subscriber from here on
        }

        private void read() {
            String name = "message", id = null, data = null;
            try (BufferedReader text = new BufferedReader(new InputStreamReader(response.body(), UTF_8))) {
                for (String line; (line = text.readLine()) != null; lines++) {
                    if (line.startsWith("event:")) name = line.substring(6).strip();
                    else if (line.startsWith("id:")) id = line.substring(3).strip();
                    else if (line.startsWith("data:")) data = (data == null ? "" : data + "\n") + line.substring(5);
                    else if (line.isEmpty()) {
                        if (id != null) lastId = id;
                        if (data != null) synchronized (events) { events.add(new Event(name, id, data)); }
                        name = "message";
                        id = null;
                        data = null;
                    }
                }
            } catch (IOException e) { /* it ended */ }
            ended = true;
        }

        boolean hasEnded() { return ended; }

        List<Event> all(String name) {
            synchronized (events) { return events.stream().filter(event -> event.name.equals(name)).toList(); }
        }

        List<Long> ids() { return all("message").stream().map(Event::message).toList(); }

        /** Fails unless each message was received once, and all in the order of their cursors. */
        void checkOrder() {
            List<Event> received = all("message");
            assertEquals(received.size(), received.stream().map(Event::message).distinct().count(), "each once");
            for (int i = 1; i < received.size(); i++)
                assertTrue(ORDER.compare(received.get(i - 1).cursor(), received.get(i).cursor()) < 0,
                        received.get(i - 1).id + " was received before " + received.get(i).id);
        }

        long lastVisits() {
            return all("visit").isEmpty() ? -1 : all("visit").getLast().json().get("total").getAsLong();
        }

        void awaits(Answer message) {
            Wait.until("a subscriber receives " + message.id(), () -> ids().contains(message.id()));
        }

        @Override public void close() throws IOException { response.body().close(); }
    }

    /** Stores so many messages at the same time; returns their ids. */
    private static List<Long> store(Caller at, int count) throws Exception {
        return store(at, count, "one of many");
    }

    private static List<Long> store(Caller at, int count, String body) throws Exception {
        Callable<Long> post = () -> at.save("a", body).expect(201).id();
        return Wait.together(Collections.nCopies(count, post));
    }

    @Nested class A_subscriber {
        @Test void gets_a_stream_that_no_proxy_buffers() throws Exception {
            try (Subscriber subscriber = new Subscriber(Servers.one(), "")) {
                assertEquals(200, subscriber.response.statusCode());
                Map<String, List<String>> headers = Answer.anyCase(subscriber.response.headers().map());
                assertTrue(headers.get("content-type").getFirst().startsWith("text/event-stream"), "" + headers);
                assertEquals(List.of("no"), headers.get("x-accel-buffering"));
                assertEquals(List.of("web1"), headers.get("x-instance-id"));
                assertTrue(headers.get("cache-control").getFirst().contains("no-"), "" + headers);
            }
        }

        /** A client that has the head of the stream receives all that is stored from then on. */
        @Test void gets_the_head_of_its_stream_when_its_cursor_is_known() throws Exception {
            try (OutageTest.Proxied proxied = new OutageTest.Proxied("begin")) {
                proxied.postgres.hang();
                HttpRequest request = HttpRequest.newBuilder(proxied.instance.uri("/api/events")).build();
                var stream = Caller.CLIENT.sendAsync(request, HttpResponse.BodyHandlers.ofInputStream());
                Thread.sleep(300);
                boolean early = stream.isDone();
                proxied.postgres.mend();
                stream.get().body().close();
                assertFalse(early, "it began before PostgreSQL had returned the cursor");
            }
        }

        @Test void receives_what_is_stored_on_every_instance() throws Exception {
            try (Subscriber subscriber = new Subscriber(Servers.three().get(0), "");
                    Subscriber other = new Subscriber(Servers.three().get(2), "")) {
                for (Instance instance : Servers.three()) {
                    Answer message = instance.save("ann", "by " + instance.name + "\nin two lines, "
                            + MessagesTest.SMILE).expect(201);
                    subscriber.awaits(message);
                    other.awaits(message);
                    Event event = subscriber.all("message").stream().filter(one -> one.message() == message.id())
                            .findFirst().orElseThrow();
                    assertEquals(message.id(), event.cursor().id());
                    assertEquals(message.json(), event.json());
                }
            }
        }

        @Test void receives_at_once_what_another_instance_stored() throws Exception {
            try (Subscriber subscriber = new Subscriber(Servers.three().get(0), "")) {
                List<Long> millis = new ArrayList<>();
                for (int i = 0; i < 9; i++) {
                    long begun = System.nanoTime();
                    subscriber.awaits(Servers.three().get(1).save("a", "quick").expect(201));
                    millis.add((System.nanoTime() - begun) / 1_000_000);
                }
                millis.sort(null);
                assertTrue(millis.get(4) < 300, "expected a median below 300 ms, actual: " + millis);
            }
        }

        /** Ids are assigned before the commit: the older transaction may get the higher one. */
        @Test void receives_messages_in_the_order_of_transactions_and_not_of_ids() throws Exception {
            try (Instance board = new Instance("order")) {
                board.save("a", "the first").expect(201);
                try (Connection early = Servers.connect(board.database); Statement work = early.createStatement()) {
                    early.setAutoCommit(false);
                    work.execute("SELECT pg_current_xact_id()");
                    board.sql(INSERT + "VALUES ('a', 'began later', 'x', 'later')");
                    work.execute(INSERT + "VALUES ('a', 'began earlier', 'x', 'earlier')");
                    early.commit();
                }
                try (Subscriber subscriber = new Subscriber(board, "?after=0")) {
                    Wait.until("all three are received", () -> subscriber.ids().size() == 3);
                    subscriber.checkOrder();
                    List<Long> ids = subscriber.ids();
                    assertTrue(ids.get(1) > ids.get(2), "the earlier transaction first: " + ids);
                    assertEquals(subscriber.lastId, board.get("/api/messages").expect(200).text("cursor"));
                }
            }
        }

        @Test void receives_a_message_once_that_was_sent_twice_under_one_key() throws Exception {
            try (Subscriber subscriber = new Subscriber(Servers.one(), "")) {
                String key = MessagesTest.An_idempotency_key.key();
                Answer first = Servers.one().save("a", "once", "Idempotency-Key", key).expect(201);
                for (Instance any : Servers.three()) any.save("a", "once", "Idempotency-Key", key).expect(200);
                subscriber.awaits(Servers.one().save("a", "the one after").expect(201));
                assertEquals(1, subscriber.ids().stream().filter(id -> id == first.id()).count());
            }
        }

        @Test void receives_visits_at_most_four_times_a_second() throws Exception {
            try (Subscriber subscriber = new Subscriber(Servers.three().get(1), "")) {
                long begun = System.nanoTime(), last = 0;
                while (System.nanoTime() - begun < 2_000_000_000L)
                    last = Servers.three().get((int) (last % 3)).visits();
                double seconds = (System.nanoTime() - begun) / 1e9;
                int received = subscriber.all("visit").size();
                assertTrue(received >= 2 && received <= 4 * seconds + 2, "expected 2 to " + (4 * seconds + 2)
                        + " events, actual: " + received);
                long total = last;
                Wait.until("the last visit is received", () -> subscriber.lastVisits() >= total);
                assertEquals(Servers.one().get("/api/visits").json(), subscriber.all("visit").getLast().json());
            }
        }

        @Test void receives_hundreds_at_once_if_it_keeps_up() throws Exception {
            try (Instance board = new Instance("busy"); Subscriber subscriber = new Subscriber(board, "")) {
                List<Long> stored = store(board, 400);
                Wait.until("all are received", () -> subscriber.ids().containsAll(stored));
                subscriber.checkOrder();
            }
        }

        /** The messages of an open transaction may become visible behind later ones. */
        @Test void receives_nothing_that_an_older_message_could_still_precede() throws Exception {
            try (Instance board = new Instance("order"); Subscriber subscriber = new Subscriber(board, "")) {
                board.save("a", "before").expect(201);
                try (Connection slow = Servers.connect(board.database); Statement work = slow.createStatement()) {
                    slow.setAutoCommit(false);
                    work.execute(INSERT + "VALUES ('s', 'slow', 'x', 'x')");
                    for (int i = 0; i < 3; i++) board.save("a", "quick").expect(201);
                    Thread.sleep(300); // several polls
                    assertEquals(1, subscriber.ids().size(), "sent while an older transaction is open");
                    try (Subscriber later = new Subscriber(board, "?after=0")) {
                        slow.commit();
                        for (Subscriber one : List.of(subscriber, later)) {
                            Wait.until("all five are received", () -> one.ids().size() == 5);
                            one.checkOrder();
                            assertEquals("slow", one.all("message").get(1).json().get("body").getAsString());
                        }
                    }
                }
            }
        }

        /** Scripts see events, and no comments: a heartbeat shows them that the stream is alive. */
        @Test void receives_a_heartbeat_each_15_s_between_other_events() throws Exception {
            try (Subscriber subscriber = new Subscriber(Servers.one(), "")) {
                long begun = System.nanoTime();
                Wait.until("a heartbeat", Duration.ofSeconds(18), () -> {
                    Servers.one().visits();
                    return subscriber.all("heartbeat").size() == 1;
                });
                double seconds = (System.nanoTime() - begun) / 1e9;
                assertTrue(seconds > 14, "expected it after 15 s, actual: after " + seconds);
                assertTrue(subscriber.all("visit").size() > 10, "expected visits meanwhile");
                assertEquals("{}", subscriber.all("heartbeat").getFirst().data.strip());
            }
        }

        /** PostgreSQL updates its statistics once a second, at the end of a statement. */
        @Test void shares_each_read_with_all_at_the_same_cursor() throws Exception {
            List<Subscriber> all = new ArrayList<>();
            try (Instance board = new Instance("shared")) {
                for (int i = 0; i < 40; i++) all.add(new Subscriber(board, ""));
                for (int i = 0; i < 20; i++) {
                    if (i == 19) Thread.sleep(1_100);
                    Answer message = board.save("a", "b").expect(201);
                    for (Subscriber one : all) one.awaits(message);
                }
                int read = rowsRead(board);
                assertTrue(read > 20 && read < 400, "expected some reads for each of 20 messages, not 40: " + read);
            } finally {
                for (Subscriber one : all) one.close();
            }
        }

        @Test void is_forgotten_when_it_has_disconnected() throws Exception {
            Instance instance = Servers.three().get(1);
            double before = instance.metric("threefold_sse_subscribers");
            List<Subscriber> subscribers = new ArrayList<>();
            for (int i = 0; i < 20; i++) subscribers.add(new Subscriber(instance, ""));
            assertEquals(before + 20, instance.metric("threefold_sse_subscribers"));
            for (Subscriber subscriber : subscribers) subscriber.close();
            Wait.until("they are forgotten once there is something to send", () -> {
                Servers.one().save("a", "for all subscribers").expect(201);
                return instance.metric("threefold_sse_subscribers") <= before;
            });
        }
    }

    /** The number of messages that PostgreSQL has read for a board. */
    private static int rowsRead(Instance board) {
        return Integer.parseInt(board.sql(
                "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'messages'").getFirst());
    }

    /** Each on a board of its own, as a subscriber receives all messages of a board. */
    @Nested class A_subscriber_that_reconnects {
        @ParameterizedTest @ValueSource(strings = {"Last-Event-ID", "after"})
        void receives_what_it_missed(String how) throws Exception {
            try (Instance board = new Instance("missed")) {
                String cursor;
                List<Long> missed;
                try (Subscriber present = new Subscriber(board, "")) {
                    List<Long> received = store(board, 80);
                    Wait.until("the first 80 are received", () -> present.ids().containsAll(received));
                    cursor = present.lastId;
                    missed = store(board, 30);
                    Wait.until("and 30 more", () -> present.ids().containsAll(missed));
                }
                try (Subscriber subscriber = how.equals("after") ? new Subscriber(board, "?after=" + cursor)
                        : new Subscriber(board, "", how, cursor)) {
                    Wait.until("all missed messages are received", () -> subscriber.ids().containsAll(missed));
                    subscriber.checkOrder();
                    assertEquals(missed.size(), subscriber.ids().size(), "and no others");
                }
            }
        }

        @ParameterizedTest @ValueSource(ints = {0, 3})
        void before_its_first_event_receives_what_it_missed(int stored) throws Exception {
            try (Instance board = new Instance("idle")) {
                board.awaitReady();
                store(board, stored);
                String cursor;
                try (Subscriber subscriber = new Subscriber(board, "")) {
                    Wait.until("it has a cursor", () -> subscriber.lastId != null);
                    cursor = subscriber.lastId;
                }
                // Transactions that stored nothing, which a standby that takes over need not know of.
                for (int i = 0; i < 5; i++) board.sql("SELECT pg_current_xact_id()");
                try (Subscriber other = new Subscriber(board, "")) {
                    Wait.until("a cursor is that of a message", () -> cursor.equals(other.lastId));
                }
                List<Long> missed = store(board, 2);
                try (Subscriber subscriber = new Subscriber(board, "", "Last-Event-ID", cursor)) {
                    Wait.until("all missed messages are received", () -> subscriber.ids().containsAll(missed));
                    assertEquals(2, subscriber.ids().size(), "and no others");
                    assertTrue(subscriber.all("gap").isEmpty(), "no gap");
                }
            }
        }

        @Test void gets_the_cursor_of_a_message_from_the_page() throws Exception {
            try (Instance board = new Instance("page"); Subscriber subscriber = new Subscriber(board, "")) {
                board.awaitReady();
                assertTrue(page(board).contains("data-cursor=\"0-0\""), "where nothing is stored");
                subscriber.awaits(board.save("a", "b").expect(201));
                board.sql("SELECT pg_current_xact_id()");
                assertTrue(page(board).contains("data-cursor=\"" + subscriber.lastId + "\""), page(board));
            }
        }

        private static String page(Caller board) { return board.get("/", "Accept", "text/html").expect(200).body(); }

        @Test void after_more_than_fifty_thousand_messages_gets_a_gap() throws Exception {
            try (Instance board = new Instance("far"); Subscriber present = new Subscriber(board, "")) {
                List<String> ids = board.sql(INSERT
                        + "SELECT 'a', 'b', 'c', 's:' || n FROM generate_series(1, 50001) n RETURNING tx || '-' || id");
                try (Subscriber far = new Subscriber(board, "?after=0");
                     Subscriber near = new Subscriber(board, "?after=" + ids.getFirst())) {
                    Wait.until("one gets a gap", () -> far.all("gap").size() == 1);
                    Wait.until("the others receive them",
                            () -> near.ids().size() > 1_000 && present.ids().size() > 1_000);
                    assertTrue(near.all("gap").isEmpty() && far.ids().isEmpty(), "one of them has a gap, not both");
                    assertTrue(present.all("gap").isEmpty(), "a subscriber that stays has none");
                }
            }
        }

        @Test void receives_the_rest_from_any_instance() throws Exception {
            try (Instance first = new Instance("first"); Instance second = new Instance("second", first.database)) {
                Set<Long> stored = new TreeSet<>(), received = new TreeSet<>();
                String cursor = "0";
                for (int round = 0; round < 10; round++) {
                    stored.addAll(store(round % 2 == 0 ? second : first, 20));
                    Instance at = round % 3 == 0 ? second : first;
                    try (Subscriber subscriber = new Subscriber(at, "", "Last-Event-ID", cursor)) {
                        stored.addAll(store(round % 2 == 0 ? first : second, 7));
                        Wait.until("it has all", () -> received.size() + subscriber.ids().size() == stored.size());
                        subscriber.checkOrder();
                        for (long id : subscriber.ids()) assertTrue(received.add(id), id + " was received before");
                        cursor = subscriber.lastId;
                    }
                }
                assertEquals(stored, received);
            }
        }

        /** As numbers: 9 is before 10, and 99 before 100; also where ids have another order, on more than one page. */
        @Test void receives_messages_in_the_order_of_transactions() throws Exception {
            try (Instance board = new Instance("numbers")) {
                board.awaitReady();
                board.sql("INSERT INTO messages (author, body, instance, request_key, tx) SELECT 'a', 'in order', "
                        + "'other', 's:' || tx, tx::text::xid8 FROM generate_series(108, 9, -1) AS tx");
                try (Subscriber subscriber = new Subscriber(board, "?after=0")) {
                    Wait.until("all are received", () -> subscriber.ids().size() == 100);
                    subscriber.checkOrder();
                }
            }
        }

        @ParameterizedTest @ValueSource(strings = {"999999999999-1", "5-1", "1-0"})
        void with_a_cursor_of_another_database_gets_a_gap(String cursor) throws Exception {
            try (Instance board = new Instance("gap")) {
                store(board, 3);
                try (Subscriber subscriber = new Subscriber(board, "", "Last-Event-ID", cursor)) {
                    Wait.until("it gets a gap", () -> subscriber.all("gap").size() == 1);
                    subscriber.awaits(board.save("a", "and goes on").expect(201));
                    assertEquals(1, subscriber.ids().size());
                    Event gap = subscriber.all("gap").getFirst();
                    assertTrue(ORDER.compare(gap.cursor(), subscriber.all("message").getFirst().cursor()) < 0);
                    assertEquals("{\"after\":\"" + cursor + "\"}", gap.data.strip());
                }
            }
        }

        /** Also when PostgreSQL could not be read at first. */
        @ParameterizedTest @ValueSource(booleans = {false, true})
        void with_a_backlog_of_more_than_50_000_gets_a_gap(boolean afterAnOutage) throws Exception {
            try (OutageTest.Proxied behind = new OutageTest.Proxied("behind")) {
                behind.instance.sql("INSERT INTO messages (author, body, instance, request_key) "
                        + "SELECT 'a', 'missed', 'other', 's:' || n FROM generate_series(1, 50001) AS n");
                if (afterAnOutage) behind.postgres.cut();
                try (Subscriber subscriber = new Subscriber(behind.instance, "?after=0")) {
                    behind.postgres.mend();
                    Wait.until("it gets a gap", Duration.ofSeconds(10), () -> !subscriber.all("gap").isEmpty());
                    assertEquals(0, subscriber.ids().size());
                }
            }
        }

        @ParameterizedTest @ValueSource(ints = {99, 100, 101, 950})
        void receives_a_long_backlog(int count) throws Exception {
            try (Instance board = new Instance("missed")) {
                Set<Long> missed = new TreeSet<>(store(board, count));
                try (Subscriber subscriber = new Subscriber(board, "?after=0")) {
                    missed.addAll(store(board, 15)); // others go on writing meanwhile
                    Wait.until("all are received", () -> subscriber.ids().size() == missed.size());
                    subscriber.checkOrder();
                    assertEquals(missed, new TreeSet<>(subscriber.ids()));
                }
            }
        }

        @Test void receives_exactly_what_follows_its_last_event() throws Exception {
            try (Instance board = new Instance("edge")) {
                List<Event> sent;
                store(board, 150);
                try (Subscriber all = new Subscriber(board, "?after=0")) {
                    Wait.until("all are received", () -> all.ids().size() == 150);
                    sent = all.all("message");
                }
                for (int seen = 47; seen <= 53; seen++) { // a page has at most 50 events
                    try (Subscriber subscriber = new Subscriber(board, "", "Last-Event-ID", sent.get(seen - 1).id())) {
                        List<Long> missed = sent.subList(seen, 150).stream().map(Event::message).toList();
                        Wait.until("all after " + seen, () -> subscriber.ids().containsAll(missed));
                        assertEquals(missed.size(), subscriber.ids().size(), "and no more");
                    }
                }
            }
        }

        @Test void receives_what_it_missed_when_PostgreSQL_is_back() throws Exception {
            try (OutageTest.Proxied cut = new OutageTest.Proxied("cut");
                    Instance elsewhere = new Instance("elsewhere", cut.database)) {
                List<Long> stored = store(elsewhere, 10);
                cut.postgres.cut();
                try (Subscriber subscriber = new Subscriber(cut.instance, "?after=0");
                        Subscriber fresh = new Subscriber(cut.instance, "")) {
                    cut.instance.awaitDegraded();
                    assertNull(fresh.lastId, "no cursor is known");
                    cut.postgres.mend();
                    Wait.until("all missed messages are received", () -> subscriber.ids().containsAll(stored));
                    Wait.until("the one without a cursor gets a gap", () -> fresh.all("gap").size() == 1);
                    assertEquals("{\"after\":null}", fresh.all("gap").getFirst().data.strip());
                    fresh.awaits(elsewhere.save("a", "and goes on").expect(201));
                }
            }
        }

        /** An id alone is no cursor: see the next tests. */
        @ParameterizedTest @ValueSource(strings = {"abc", "-1", "7", "00", "1-2-3", "99999999999999999999", "7-",
                "999999999999999999", "1%00", "<x>", " ", "1-1234567890123456789"})
        void has_to_name_a_cursor(String last) {
            String encoded = last.replace("<x>", "%3Cx%3E").replace(" ", "%20");
            Servers.one().get("/api/events?after=" + encoded).problem(400, "after", "cursor", "7421-88");
            Servers.one().get("/api/events?after=0", "Last-Event-ID", "x" + last).problem(400, "Last-Event-ID");
            Servers.one().get("/api/events?after=").problem(400, "after");
        }

        @Test void may_send_an_empty_id() throws Exception {
            try (Subscriber subscriber = new Subscriber(Servers.one(), "", "Last-Event-ID", "")) {
                assertEquals(200, subscriber.response.statusCode());
                subscriber.awaits(Servers.one().save("a", "b").expect(201));
            }
        }

        /** Ids are assigned before the commit: a smaller one may become visible later. */
        @ParameterizedTest @ValueSource(strings = {"JSON", "HTML"})
        void misses_nothing_that_is_not_on_its_page(String form) throws Exception {
            try (Instance board = new Instance("slow-neighbour")) {
                long first = board.save("a", "before").expect(201).id();
                try (Connection older = Servers.connect(board.database)) {
                    older.setAutoCommit(false);
                    older.createStatement().execute(INSERT + "VALUES ('a', 'stored late', 'other', 's:late')");
                    long newest = board.save("a", "stored meanwhile").expect(201).id();
                    String cursor = form.equals("JSON") ? board.get("/api/messages").expect(200).text("cursor")
                            : page(board).replaceAll("(?s).*data-cursor=\"([^\"]*)\".*", "$1");
                    older.commit();
                    try (Subscriber subscriber = new Subscriber(board, "?after=" + cursor)) {
                        Wait.until("the late one is received",
                                () -> subscriber.ids().equals(List.of(first + 1, newest)));
                        assertTrue(subscriber.all("gap").isEmpty(), "no gap");
                    }
                }
            }
        }
    }

    @Nested class A_slow_subscriber {
        @Test @Timeout(120) void costs_little_and_receives_all_in_order_or_is_dropped_after_30_s() throws Exception {
            try (Instance board = new Instance("slow"); RawConnection slow = new RawConnection(board.port, 4_096);
                 RawConnection stalled = new RawConnection(board.port, 4_096);
                 Subscriber other = new Subscriber(board, "")) {
                for (RawConnection one : List.of(slow, stalled))
                    one.send(HttpTest.request("GET", "/api/events")).read(true).expect(200);
                Wait.until("all have joined", () -> board.metric("threefold_sse_subscribers") == 3);
                List<Long> stored = new ArrayList<>();
                for (int round = 0; round < 20; round++) {
                    stored.addAll(store(board, 32, MessagesTest.SMILE.repeat(1_900)));
                    Wait.until("the other one keeps up", Duration.ofSeconds(30),
                            () -> other.all("message").size() == stored.size());
                    double buffered = board.metric("threefold_buffered_bytes");
                    assertTrue(buffered < 40_000, "expected at most a chunk for each slow one, actual: " + buffered);
                }
                assertTrue(board.metric("threefold_buffered_bytes") > 0, "expected that the slow ones wait by now");
                List<Long> received = new ArrayList<>();
                slow.socket.setSoTimeout(60_000); // TCP probes a full window less and less often
                while (received.size() < stored.size()) {
                    String line = slow.line();
                    if (line.startsWith("data: {\"id\":"))
                        received.add(Long.parseLong(line.substring(12, line.indexOf(',')).strip()));
                }
                assertEquals(other.ids(), received);
                Wait.until("the stalled one is dropped, and nothing is buffered for either", Duration.ofSeconds(40),
                        () -> board.metric("threefold_sse_subscribers") == 2
                                && board.metric("threefold_buffered_bytes") == 0);
            }
        }

        /** Large events that it does not take are read again: so a page has fewer of them. */
        @Test void receives_all_and_each_row_is_read_a_few_times() throws Exception {
            try (Instance board = new Instance("little"); RawConnection slow = new RawConnection(board.port, 4_096)) {
                board.awaitReady();
                board.sql(INSERT + "SELECT 'a', repeat('" + MessagesTest.SMILE + "', 1990), 'other', 's:' || n "
                        + "FROM generate_series(1, 3500) AS n");
                slow.send(HttpTest.request("GET", "/api/events?after=0"));
                slow.socket.setSoTimeout(60_000);
                int received = 0;
                for (String line = ""; received < 3_500; line = slow.line()) {
                    assertTrue(!line.equals("event: gap"), "expected no gap, got one after " + received + " messages");
                    if (!line.equals("event: message")) continue;
                    received++;
                    Thread.sleep(2);
                }
                Wait.until("what was read is counted, and less than ten times 3,500 rows",
                        () -> rowsRead(board) > 3_500 && rowsRead(board) < 35_000);
            }
        }

        /** Each parameter takes fifty times as much memory as in the URL, for as long as the stream is open. */
        @Test void takes_no_more_memory_with_thousands_of_parameters() throws Exception {
            String many = IntStream.range(0, 2_000).mapToObj(n -> "&" + Integer.toString(1_296 + n, 36))
                    .collect(Collectors.joining());
            List<RawConnection> open = new ArrayList<>();
            try {
                long before = heapInUse();
                for (int i = 0; i < 150; i++) {
                    open.add(Servers.one().connect());
                    open.getLast().send("GET /api/events?after=0" + many + " HTTP/1.1\r\nHost: a\r\n\r\n");
                }
                Wait.until("all have joined", () -> Servers.one().metric("threefold_sse_subscribers") >= 150);
                Wait.until("their first pages are sent, and each takes less than 60 KB",
                        () -> (heapInUse() - before) / 150 < 60_000);
            } finally {
                for (RawConnection connection : open) connection.close();
            }
        }

        private static long heapInUse() throws InterruptedException {
            for (int i = 0; i < 3; i++) {
                System.gc();
                Thread.sleep(100);
            }
            return Runtime.getRuntime().totalMemory() - Runtime.getRuntime().freeMemory();
        }

        @Test void is_not_one_of_thousands() throws Exception {
            try (Instance board = new Instance("full")) {
                List<RawConnection> subscribers = new ArrayList<>();
                try {
                    for (int i = 0; i < Events.MAX_SUBSCRIBERS; i++) {
                        subscribers.add(board.connect());
                        subscribers.getLast().send(HttpTest.request("GET", "/api/events?after=0"));
                    }
                    for (RawConnection subscriber : subscribers) subscriber.read(true).expect(200);
                    assertEquals(Events.MAX_SUBSCRIBERS, board.metric("threefold_sse_subscribers"));
                    board.get("/api/events").unavailable();
                    board.save("a", "still served").expect(201);
                } finally {
                    for (RawConnection subscriber : subscribers) subscriber.close();
                }
            }
        }
    }

    /** Through a proxy, so that only one board loses Redis. */
    @Nested class When_Redis {
        @Test void is_back_all_messages_were_received() throws Exception {
            try (OutageTest.Proxied cut = new OutageTest.Proxied("cut");
                    Subscriber subscriber = new Subscriber(cut.instance, "")) {
                subscriber.awaits(cut.instance.save("a", "before").expect(201));
                cut.redis.cut();
                cut.instance.awaitDegraded();
                List<Answer> sent = new ArrayList<>();
                for (int i = 0; i < 5; i++) sent.add(cut.instance.save("a", "meanwhile " + i).expect(201));
                cut.redis.mend();
                sent.add(cut.instance.save("a", "after").expect(201));
                for (Answer one : sent) subscriber.awaits(one);
            }
        }

        @Test void goes_on_after_it_hung_all_messages_were_received() throws Exception {
            try (OutageTest.Proxied hung = new OutageTest.Proxied("hung");
                    Subscriber subscriber = new Subscriber(hung.instance, "")) {
                subscriber.awaits(hung.instance.save("a", "before").expect(201));
                hung.redis.hang();
                List<Answer> sent = new ArrayList<>();
                sent.add(hung.instance.save("a", "at first").expect(201));
                hung.instance.awaitDegraded();
                for (int i = 0; i < 3; i++) sent.add(hung.instance.save("a", "meanwhile " + i).expect(201));
                hung.instance.get("/").expect(200);
                Thread.sleep(400); // several polls
                hung.redis.mend();
                for (Answer one : sent) subscriber.awaits(one);
            }
        }
    }
}
