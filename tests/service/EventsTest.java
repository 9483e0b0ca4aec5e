import com.google.gson.JsonParser;
import org.junit.jupiter.api.Nested;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.sql.Connection;
import java.sql.Statement;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;
import java.util.stream.IntStream;

import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

/** Live events: what happens on one instance is seen on all, and what was missed is brought later. */
@ExtendWith(LogCapture.class)
class EventsTest {

    /** One event as the browser gets it. */
    record Event(String name, String id, String data) {
        /** The message's own id: the event has none, or the same. */
        long message() { return JsonParser.parseString(data).getAsJsonObject().get("id").getAsLong(); }

        /** Its id, which names the message as well. */
        Cursor place() {
            Cursor place = Cursor.parse(id);
            assertEquals(name.equals("message") ? message() : place.id(), place.id(), "the id of " + this);
            return place;
        }
    }

    /** An open page: collects what it is told, and remembers the last id as a browser does. */
    static final class Subscriber implements AutoCloseable {
        final HttpResponse<InputStream> response;
        private final List<Event> events = new ArrayList<>();
        private volatile boolean ended;
        private volatile int lines;
        private volatile String place; // as a browser has it: what it says when it comes again

        Subscriber(Caller instance, String query, String... headers) throws Exception {
            HttpRequest.Builder request = HttpRequest.newBuilder(instance.uri("/api/events" + query))
                    .header("Accept", "text/event-stream");
            if (headers.length > 0) request.headers(headers);
            response = Caller.CLIENT.send(request.build(), HttpResponse.BodyHandlers.ofInputStream());
            Thread.ofVirtual().start(this::read);
            Wait.until("the stream has begun", () -> lines > 0); // the instance knows the viewer from here on
        }

        private void read() {
            String name = "message", id = null, data = null;
            try (BufferedReader text = new BufferedReader(new InputStreamReader(response.body(), UTF_8))) {
                for (String line; (line = text.readLine()) != null; lines++) {
                    if (line.startsWith("event:")) name = line.substring(6).strip();
                    else if (line.startsWith("id:")) id = line.substring(3).strip();
                    else if (line.startsWith("data:")) data = (data == null ? "" : data + "\n") + line.substring(5);
                    else if (line.isEmpty()) {
                        if (id != null) place = id;
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

        /** What a browser says when it comes again; the given one if it was told none. */
        String lastEventId(String before) {
            return all("message").stream().map(Event::id).reduce((first, second) -> second).orElse(before);
        }

        /** Each once, each with its place, and the places in their order. */
        void checkInTurn() {
            List<Event> told = all("message");
            assertEquals(told.size(), told.stream().map(Event::message).distinct().count(), "each is told once");
            for (int i = 1; i < told.size(); i++)
                assertTrue(told.get(i - 1).place().compareTo(told.get(i).place()) < 0,
                        told.get(i - 1).id + " was told before " + told.get(i).id);
        }

        long lastVisits() {
            return all("visit").isEmpty() ? -1
                    : JsonParser.parseString(all("visit").getLast().data).getAsJsonObject().get("total").getAsLong();
        }

        void awaits(Answer message) { Wait.until("a viewer is told of " + message.id(), () -> ids()
                .contains(message.id())); }

        @Override public void close() throws IOException { response.body().close(); }
    }

    @Nested class A_viewer {
        @Test void gets_a_stream_that_no_proxy_holds_back() throws Exception {
            try (Subscriber viewer = new Subscriber(Servers.one(), "")) {
                assertEquals(200, viewer.response.statusCode());
                Map<String, List<String>> headers = Answer.anyCase(viewer.response.headers().map());
                assertTrue(headers.get("content-type").getFirst().startsWith("text/event-stream"), "" + headers);
                assertEquals(List.of("no"), headers.get("x-accel-buffering"));
                assertEquals(List.of("web1"), headers.get("x-instance-id"));
                assertTrue(headers.get("cache-control").getFirst().contains("no-"), "" + headers);
            }
        }

        /** Whoever sees the stream begin may rely on it: what is stored from then on is told. */
        @Test void sees_it_begin_when_its_place_is_known() throws Exception {
            try (FaultProxy cable = new FaultProxy(Servers.databasePort())) {
                Map<String, String> environment = new HashMap<>(Servers.environment(Servers.newDatabase()));
                environment.put("DB_PORT", "" + cable.port());
                try (Instance board = new Instance("begin", environment)) {
                    board.awaitReady();
                    cable.hang();
                    var stream = Caller.CLIENT.sendAsync(HttpRequest.newBuilder(board.uri("/api/events")).build(),
                            HttpResponse.BodyHandlers.ofInputStream());
                    Thread.sleep(300);
                    boolean early = stream.isDone();
                    cable.mend();
                    stream.get().body().close();
                    assertFalse(early, "it began before PostgreSQL had said where");
                }
            }
        }

        @Test void is_told_what_is_stored_on_every_instance() throws Exception {
            try (Subscriber viewer = new Subscriber(Servers.three().get(0), "");
                    Subscriber other = new Subscriber(Servers.three().get(2), "")) {
                for (Instance instance : Servers.three()) {
                    Answer message = instance.say("teller", "by " + instance.name + "\nin two lines, "
                            + MessagesTest.SMILE).expect(201);
                    viewer.awaits(message);
                    other.awaits(message);
                    Event event = viewer.all("message").stream().filter(one -> one.message() == message.id())
                            .findFirst().orElseThrow();
                    assertEquals(message.id(), event.place().id());
                    assertEquals(message.json(), JsonParser.parseString(event.data));
                }
            }
        }

        /** The look that comes each second would find it as well; the word by Redis is what makes it quick. */
        @Test void is_told_at_once_of_what_another_instance_stored() throws Exception {
            try (Subscriber viewer = new Subscriber(Servers.three().get(0), "")) {
                List<Long> millis = new ArrayList<>();
                for (int i = 0; i < 9; i++) {
                    long begun = System.nanoTime();
                    viewer.awaits(Servers.three().get(1).say("a", "quick").expect(201));
                    millis.add((System.nanoTime() - begun) / 1_000_000);
                }
                millis.sort(null);
                assertTrue(millis.get(4) < 300, "expected a median below 300 ms, actual: " + millis);
            }
        }

        /** Ids are given out before the commit; who began first may get the higher one. */
        @Test void is_told_in_the_order_of_transactions_and_not_of_ids() throws Exception {
            String database = Servers.newDatabase();
            String insert = "INSERT INTO messages (author, body, instance, request_key) VALUES ";
            try (Instance board = new Instance("order", Servers.environment(database))) {
                board.say("a", "the first").expect(201);
                try (Connection early = Servers.connect(database); Statement work = early.createStatement()) {
                    early.setAutoCommit(false);
                    work.execute("SELECT pg_current_xact_id()");
                    Servers.sql(database, insert + "('a', 'began later', 'x', 'later')");
                    work.execute(insert + "('a', 'began earlier', 'x', 'earlier')");
                    early.commit();
                }
                try (Subscriber viewer = new Subscriber(board, "?after=0")) {
                    Wait.until("all three are told", () -> viewer.ids().size() == 3);
                    viewer.checkInTurn();
                    assertTrue(viewer.ids().get(1) > viewer.ids().get(2), "who began earlier first: " + viewer.ids());
                    assertEquals(viewer.place, board.get("/api/messages").expect(200).text("cursor"));
                }
            }
        }

        @Test void is_told_once_of_a_message_sent_twice_under_one_key() throws Exception {
            try (Subscriber viewer = new Subscriber(Servers.one(), "")) {
                String key = MessagesTest.An_idempotency_key.key();
                Answer first = Servers.one().say("a", "once", "Idempotency-Key", key).expect(201);
                for (Instance instance : Servers.three()) instance.say("a", "once", "Idempotency-Key", key).expect(200);
                viewer.awaits(Servers.one().say("a", "the one after").expect(201));
                assertEquals(1, viewer.ids().stream().filter(id -> id == first.id()).count());
            }
        }

        @Test void is_told_of_visits_at_most_four_times_a_second() throws Exception {
            try (Subscriber viewer = new Subscriber(Servers.three().get(1), "")) {
                long begun = System.nanoTime(), last = 0;
                while (System.nanoTime() - begun < 2_000_000_000L) last = Servers.three().get((int) (last % 3))
                        .visits();
                double seconds = (System.nanoTime() - begun) / 1e9;
                int told = viewer.all("visit").size();
                assertTrue(told >= 2 && told <= 4 * seconds + 2, "expected 2 to " + (4 * seconds + 2)
                        + " events, actual: " + told);
                long total = last;
                Wait.until("it hears of the last visit", () -> viewer.lastVisits() >= total);
                assertEquals(Servers.one().get("/api/visits").json(),
                        JsonParser.parseString(viewer.all("visit").getLast().data));
            }
        }

        @Test void who_keeps_up_is_told_of_hundreds_at_once() throws Exception {
            try (Instance board = new Instance("busy", Servers.environment(Servers.newDatabase()));
                    Subscriber viewer = new Subscriber(board, "")) {
                List<Callable<Long>> senders = new ArrayList<>();
                for (int i = 0; i < 400; i++) senders.add(() -> board.say("a", "all at once").expect(201).id());
                List<Long> stored = Wait.together(senders);
                Wait.until("all are told", () -> viewer.ids().containsAll(stored));
                viewer.checkInTurn();
            }
        }

        /** What a transaction stored that is still open can become visible behind what others stored after it. */
        @Test void is_told_nothing_that_something_older_could_still_come_before() throws Exception {
            String database = Servers.newDatabase();
            try (Instance board = new Instance("order", Servers.environment(database));
                    Subscriber viewer = new Subscriber(board, "")) {
                board.say("a", "before").expect(201);
                try (Connection slow = Servers.connect(database); Statement work = slow.createStatement()) {
                    slow.setAutoCommit(false);
                    work.execute("INSERT INTO messages (author, body, instance, request_key) VALUES ('s', "
                            + "'slow', 'x', 'x')");
                    List<Answer> quick = new ArrayList<>();
                    for (int i = 0; i < 3; i++) quick.add(board.say("a", "quick").expect(201));
                    Thread.sleep(300); // several looks
                    assertEquals(1, viewer.ids().size(), "told while something older is open");
                    try (Subscriber later = new Subscriber(board, "?after=0")) {
                        slow.commit();
                        for (Subscriber one : List.of(viewer, later)) {
                            Wait.until("all five are told", () -> one.ids().size() == 5);
                            one.checkInTurn();
                            assertEquals("slow", JsonParser.parseString(one.all("message").get(1).data)
                                    .getAsJsonObject()
                                    .get("body").getAsString());
                        }
                    }
                }
            }
        }

        /** Scripts see events, and no comments: by it they know that a stream has not gone silent. */
        @Test void gets_a_heartbeat_each_15_s_whatever_else_it_is_told() throws Exception {
            try (Subscriber viewer = new Subscriber(Servers.one(), "")) {
                long begun = System.nanoTime();
                Wait.until("there is one", Duration.ofSeconds(18), () -> {
                    Servers.one().visits();
                    return viewer.all("heartbeat").size() == 1;
                });
                double seconds = (System.nanoTime() - begun) / 1e9;
                assertTrue(seconds > 14, "expected it after 15 s, actual: after " + seconds);
                assertTrue(viewer.all("visit").size() > 10, "expected that it was told of visits meanwhile");
                assertEquals("{}", viewer.all("heartbeat").getFirst().data.strip());
            }
        }

        /** What the statistics of PostgreSQL count, they have after a second, with the next statement. */
        @Test void shares_each_read_with_all_that_are_at_the_same_cursor() throws Exception {
            String database = Servers.newDatabase();
            List<Subscriber> all = new ArrayList<>();
            try (Instance board = new Instance("shared", Servers.environment(database))) {
                for (int i = 0; i < 40; i++) all.add(new Subscriber(board, ""));
                for (int i = 0; i < 20; i++) {
                    if (i == 19) Thread.sleep(1_100);
                    Answer message = board.say("a", "b").expect(201);
                    for (Subscriber one : all) one.awaits(message);
                }
                int read = Integer.parseInt(Servers.sql(database, "SELECT idx_tup_fetch FROM pg_stat_user_tables "
                        + "WHERE relname = 'messages'").getFirst());
                assertTrue(read > 20 && read < 400, "expected some reads for each of 20 messages, not 40: " + read);
            } finally {
                for (Subscriber one : all) one.close();
            }
        }

        @Test void who_left_is_forgotten() throws Exception {
            double before = Servers.three().get(1).metric("threefold_sse_subscribers");
            List<Subscriber> viewers = new ArrayList<>();
            for (int i = 0; i < 20; i++) viewers.add(new Subscriber(Servers.three().get(1), ""));
            assertEquals(before + 20, Servers.three().get(1).metric("threefold_sse_subscribers"));
            for (Subscriber viewer : viewers) viewer.close();
            Wait.until("they are gone once there is something to tell", () -> {
                Servers.one().say("a", "is anybody there?").expect(201);
                return Servers.three().get(1).metric("threefold_sse_subscribers") <= before;
            });
        }
    }

    /** On a board of its own, since there everybody is told everything. */
    @Nested class A_viewer_who_was_away {
        private List<Long> store(Caller at, int count) throws Exception {
            List<Callable<Long>> senders = new ArrayList<>();
            for (int i = 0; i < count; i++) {
                String text = "while you were away, " + i;
                senders.add(() -> at.say("a", text).expect(201).id());
            }
            return Wait.together(senders);
        }

        @ParameterizedTest @ValueSource(strings = {"Last-Event-ID",
                "after"}) void is_brought_what_it_missed(String how) throws Exception {
            try (Instance board = new Instance("missed", Servers.environment(Servers.newDatabase()))) {
                String seen;
                List<Long> missed;
                try (Subscriber present = new Subscriber(board, "")) {
                    List<Long> told = store(board, 80);
                    Wait.until("whoever is there was told", () -> present.ids().containsAll(told));
                    seen = present.place;
                    missed = store(board, 30);
                    Wait.until("and of these", () -> present.ids().containsAll(missed));
                }
                try (Subscriber viewer = how.equals("after") ? new Subscriber(board, "?after=" + seen)
                        : new Subscriber(board, "", how, seen)) {
                    Wait.until("all that was missed is there", () -> viewer.ids().containsAll(missed));
                    viewer.checkInTurn();
                    assertEquals(missed.size(), viewer.ids().size(), "and nothing else");
                }
            }
        }

        @ParameterizedTest @ValueSource(ints = {0, 3}) void before_it_was_told_anything_is_brought_it(int stored)
                throws Exception {
            Map<String, String> database = Servers.environment(Servers.newDatabase());
            try (Instance board = new Instance("idle", database)) {
                board.awaitReady();
                store(board, stored);
                String place;
                try (Subscriber viewer = new Subscriber(board, "")) {
                    Wait.until("it knows its place", () -> viewer.place != null);
                    place = viewer.place;
                }
                // Numbers of transactions that stored nothing, and that a standby that takes over need not know of.
                for (int i = 0; i < 5; i++) Servers.sql(database.get("DB_NAME"), "SELECT pg_current_xact_id()");
                try (Subscriber other = new Subscriber(board, "")) {
                    Wait.until("a place is that of a message", () -> place.equals(other.place));
                }
                List<Long> missed = store(board, 2);
                try (Subscriber viewer = new Subscriber(board, "", "Last-Event-ID", place)) {
                    Wait.until("all that was missed is there", () -> viewer.ids().containsAll(missed));
                    assertEquals(2, viewer.ids().size(), "and nothing else");
                    assertTrue(viewer.all("gap").isEmpty(), "no gap");
                }
            }
        }

        @Test void whom_the_page_tells_where_to_begin_has_the_place_of_a_message() throws Exception {
            Map<String, String> database = Servers.environment(Servers.newDatabase());
            try (Instance board = new Instance("page", database); Subscriber viewer = new Subscriber(board, "")) {
                board.awaitReady();
                assertTrue(page(board).contains("data-cursor=\"0-0\""), "where nothing is stored");
                viewer.awaits(board.say("a", "b").expect(201));
                Servers.sql(database.get("DB_NAME"), "SELECT pg_current_xact_id()");
                assertTrue(page(board).contains("data-cursor=\"" + viewer.place + "\""), page(board));
            }
        }
        private static String page(Caller board) throws Exception {
            return board.get("/", "Accept", "text/html").expect(200).body();
        }

        @Test void for_more_than_fifty_thousand_messages_is_told_that_there_is_a_gap() throws Exception {
            Map<String, String> database = Servers.environment(Servers.newDatabase());
            try (Instance board = new Instance("far", database); Subscriber present = new Subscriber(board, "")) {
                List<String> ids = Servers.sql(database.get("DB_NAME"), "INSERT INTO messages (author, body, instance, "
                        + "request_key) SELECT 'a', 'b', 'c', 's:' || n FROM generate_series(1, 50001) n "
                        + "RETURNING tx || '-' || id");
                try (Subscriber far = new Subscriber(board, "?after=0");
                     Subscriber near = new Subscriber(board, "?after=" + ids.getFirst())) {
                    Wait.until("it hears of the gap", () -> far.all("gap").size() == 1);
                    Wait.until("the others are brought them",
                            () -> near.ids().size() > 1_000 && present.ids().size() > 1_000);
                    assertTrue(near.all("gap").isEmpty() && far.ids().isEmpty(), "one of them has a gap, not both");
                    assertTrue(present.all("gap").isEmpty(), "a subscriber that stays has none");
                }
            }
        }

        @Test void is_brought_it_by_whichever_instance_it_comes_to() throws Exception {
            Map<String, String> database = Servers.environment(Servers.newDatabase());
            try (Instance first = new Instance("first", database); Instance second = new Instance("second", database)) {
                Set<Long> stored = new TreeSet<>(), told = new TreeSet<>();
                String place = "0";
                for (int visit = 0; visit < 10; visit++) {
                    stored.addAll(store(visit % 2 == 0 ? second : first, 20));
                    try (Subscriber viewer = new Subscriber(visit % 3 == 0 ? second : first, "", "Last-Event-ID", place)) {
                        stored.addAll(store(visit % 2 == 0 ? first : second, 7));
                        Wait.until("it has all", () -> told.size() + viewer.ids().size() == stored.size());
                        viewer.checkInTurn();
                        for (long id : viewer.ids()) assertTrue(told.add(id), id + " was told before");
                        place = viewer.lastEventId(place);
                    }
                }
                assertEquals(stored, told);
            }
        }

        /** As numbers: 9 is before 10, and 99 before 100; also where ids have another order, on more than one page. */
        @Test void is_brought_it_in_the_order_of_the_transactions() throws Exception {
            Map<String, String> database = Servers.environment(Servers.newDatabase());
            try (Instance board = new Instance("numbers", database)) {
                board.awaitReady();
                Servers.sql(database.get("DB_NAME"), "INSERT INTO messages (author, body, instance, request_key, tx) "
                        + "SELECT 'a', 'told in turn', 'other', 's:' || tx, tx::text::xid8 "
                        + "FROM generate_series(108, 9, -1) AS tx");
                try (Subscriber viewer = new Subscriber(board, "?after=0")) {
                    Wait.until("all is told", () -> viewer.ids().size() == 100);
                    viewer.checkInTurn();
                }
            }
        }

        @ParameterizedTest @ValueSource(strings = {"999999999999-1", "5-1", "1-0"})
        void from_a_place_that_is_not_known_here_is_told_that_there_is_a_gap(String place) throws Exception {
            try (Instance board = new Instance("gap", Servers.environment(Servers.newDatabase()))) {
                store(board, 3);
                try (Subscriber viewer = new Subscriber(board, "", "Last-Event-ID", place)) {
                    Wait.until("it hears of the gap", () -> viewer.all("gap").size() == 1);
                    viewer.awaits(board.say("a", "and goes on").expect(201));
                    assertEquals(1, viewer.ids().size());
                    Event gap = viewer.all("gap").getFirst();
                    assertTrue(gap.place().compareTo(viewer.all("message").getFirst().place()) < 0, "" + gap);
                    assertEquals("{\"after\":\"" + place + "\"}", gap.data.strip());
                }
            }
        }

        @ParameterizedTest @ValueSource(ints = {99, 100, 101,
                950}) void long_is_brought_all_of_it(int count) throws Exception {
            try (Instance board = new Instance("missed", Servers.environment(Servers.newDatabase()))) {
                Set<Long> missed = new TreeSet<>(store(board, count));
                try (Subscriber viewer = new Subscriber(board, "?after=0")) {
                    missed.addAll(store(board, 15)); // others go on writing meanwhile
                    Wait.until("all is told", () -> viewer.ids().size() == missed.size());
                    viewer.checkInTurn();
                    assertEquals(missed, new TreeSet<>(viewer.ids()));
                }
            }
        }

        @Test void is_brought_exactly_what_came_after_the_message_it_names() throws Exception {
            try (Instance board = new Instance("edge", Servers.environment(Servers.newDatabase()))) {
                List<Event> told;
                store(board, 150);
                try (Subscriber all = new Subscriber(board, "?after=0")) {
                    Wait.until("all is told", () -> all.ids().size() == 150);
                    told = all.all("message");
                }
                for (int seen = 47; seen <= 53; seen++) { // from 50 on, what follows is read at once
                    try (Subscriber viewer = new Subscriber(board, "", "Last-Event-ID", told.get(seen - 1).id())) {
                        List<Long> missed = told.subList(seen, 150).stream().map(Event::message).toList();
                        Wait.until("all after " + seen + " is told", () -> viewer.ids().containsAll(missed));
                        assertEquals(missed.size(), viewer.ids().size(), "and no more");
                    }
                }
            }
        }

        @Test void is_brought_what_it_missed_when_PostgreSQL_is_back() throws Exception {
            Map<String, String> database = Servers.environment(Servers.newDatabase()), by = new HashMap<>(database);
            try (FaultProxy cable = new FaultProxy(Servers.databasePort());
                    Instance elsewhere = new Instance("elsewhere", database)) {
                by.put("DB_PORT", "" + cable.port());
                try (Instance board = new Instance("cut", by)) {
                    board.awaitReady();
                    List<Long> stored = store(elsewhere, 10);
                    cable.cut();
                    try (Subscriber viewer = new Subscriber(board, "?after=0");
                            Subscriber fresh = new Subscriber(board, "")) {
                        Wait.until("it is noticed", () -> board.get("/readyz").text("status").equals("degraded"));
                        assertNull(fresh.place, "no cursor is known");
                        cable.mend();
                        Wait.until("all that was missed is there", () -> viewer.ids().containsAll(stored));
                        Wait.until("the one without a cursor has a gap", () -> fresh.all("gap").size() == 1);
                        assertEquals("{\"after\":null}", fresh.all("gap").getFirst().data.strip());
                        fresh.awaits(elsewhere.say("a", "and goes on").expect(201));
                    }
                }
            }
        }

        /** A number alone says nothing of the order: see the next test. */
        @ParameterizedTest @ValueSource(strings = {"abc", "-1", "7", "00", "1-2-3", "99999999999999999999", "7-",
                "999999999999999999", "1%00", "<x>", " ", "1-1234567890123456789"})
        void has_to_name_a_cursor(String last) {
            String encoded = last.replace("<x>", "%3Cx%3E").replace(" ", "%20");
            Servers.one().get("/api/events?after=" + encoded).problem(400, "after", "cursor", "7421-88");
            Servers.one().get("/api/events?after=0", "Last-Event-ID", "x" + last).problem(400, "Last-Event-ID");
            Servers.one().get("/api/events?after=").problem(400, "after");
        }

        @Test void who_was_told_no_id_may_say_so() throws Exception {
            try (Subscriber viewer = new Subscriber(Servers.one(), "", "Last-Event-ID", "")) {
                assertEquals(200, viewer.response.statusCode());
                viewer.awaits(Servers.one().say("a", "told").expect(201));
            }
        }

        /** Ids are given out before the commit: a smaller one may become visible later. */
        @ParameterizedTest @ValueSource(strings = {"JSON", "HTML"})
        void misses_nothing_that_is_not_on_the_page_it_saw(String form) throws Exception {
            Map<String, String> database = Servers.environment(Servers.newDatabase());
            try (Instance board = new Instance("slow-neighbour", database)) {
                long first = board.say("a", "before").expect(201).id();
                try (Connection older = Servers.connect(database.get("DB_NAME"))) {
                    older.setAutoCommit(false);
                    older.createStatement().execute("INSERT INTO messages (author, body, instance, request_key) "
                            + "VALUES ('a', 'stored late', 'other', 's:late')");
                    long newest = board.say("a", "stored meanwhile").expect(201).id();
                    String cursor = form.equals("JSON") ? board.get("/api/messages").expect(200).text("cursor")
                            : page(board).replaceAll("(?s).*data-cursor=\"([^\"]*)\".*", "$1");
                    older.commit();
                    try (Subscriber viewer = new Subscriber(board, "?after=" + cursor)) {
                        Wait.until("the late one is told", () -> viewer.ids().equals(List.of(first + 1, newest)));
                        assertTrue(viewer.all("gap").isEmpty(), "no gap");
                    }
                }
            }
        }
    }

    @Nested class A_viewer_who_does_not_read {
        @Test void costs_little_and_has_all_in_its_order_when_it_reads_again() throws Exception {
            try (Instance board = new Instance("slow", Servers.environment(Servers.newDatabase()));
                 RawConnection slow = new RawConnection(board.port, 4_096);
                 RawConnection stalled = new RawConnection(board.port, 4_096);
                 Subscriber other = new Subscriber(board, "")) {
                for (RawConnection one : List.of(slow, stalled))
                    one.send(HttpTest.request("GET", "/api/events")).read(true).expect(200);
                Wait.until("all have joined", () -> board.metric("threefold_sse_subscribers") == 3);
                String long2000 = MessagesTest.SMILE.repeat(1_900);
                List<Long> stored = new ArrayList<>();
                for (int round = 0; round < 20; round++) {
                    List<Callable<Long>> senders = new ArrayList<>();
                    for (int i = 0; i < 32; i++) senders.add(() -> board.say("a", long2000).expect(201).id());
                    stored.addAll(Wait.together(senders));
                    Wait.until("the other one keeps up", Duration.ofSeconds(30),
                            () -> other.all("message").size() == stored.size());
                    double held = board.metric("threefold_buffered_bytes");
                    assertTrue(held < 40_000, "expected at most a piece for the slow one, actual: " + held);
                }
                assertTrue(board.metric("threefold_buffered_bytes") > 0, "expected that the slow one is stuck by now");
                List<Long> told = new ArrayList<>();
                slow.socket.setSoTimeout(60_000); // TCP asks more and more seldom whether there is room again
                while (told.size() < stored.size()) {
                    String line = slow.readLine();
                    if (line.startsWith("data: {\"id\":")) told.add(Long.parseLong(line.substring(12,
                            line.indexOf(',')).strip()));
                }
                assertEquals(other.ids(), told);
                Wait.until("the one that never reads is dropped, and nothing is kept for either", Duration.ofSeconds(40),
                        () -> board.metric("threefold_sse_subscribers") == 2
                                && board.metric("threefold_buffered_bytes") == 0);
            }
        }

        /** What it does not take is read again: then few at a time. */
        @Test void but_a_little_at_a_time_is_told_all_and_it_is_not_read_many_times() throws Exception {
            Map<String, String> database = Servers.environment(Servers.newDatabase());
            try (Instance board = new Instance("little", database); RawConnection slow = new RawConnection(board.port, 4_096)) {
                board.awaitReady();
                Servers.sql(database.get("DB_NAME"), "INSERT INTO messages (author, body, instance, request_key) "
                        + "SELECT 'a', repeat('" + MessagesTest.SMILE + "', 1990), 'other', 's:' || n "
                        + "FROM generate_series(1, 3500) AS n");
                slow.send(HttpTest.request("GET", "/api/events?after=0"));
                slow.socket.setSoTimeout(60_000);
                int told = 0;
                for (String line = ""; told < 3_500; line = slow.readLine()) {
                    assertTrue(!line.equals("event: gap"), "expected no gap, saw one after " + told + " messages");
                    if (!line.equals("event: message")) continue;
                    told++;
                    Thread.sleep(2);
                }
                Wait.until("what was read is counted, and less than ten times 3,500 rows", () -> {
                    long read = Long.parseLong(Servers.sql(database.get("DB_NAME"),
                            "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'messages'").getFirst());
                    return read > 3_500 && read < 35_000;
                });
            }
        }

        /** Each of them costs fifty times as much memory as in the URL, for as long as the stream is open. */
        @Test void costs_no_more_with_thousands_of_parameters() throws Exception {
            String many = IntStream.range(0, 2_000).mapToObj(n -> "&" + Integer.toString(1_296 + n, 36))
                    .collect(Collectors.joining());
            List<RawConnection> open = new ArrayList<>();
            try {
                long before = heapInUse();
                for (int i = 0; i < 150; i++) {
                    open.add(Servers.one().wire());
                    open.getLast().send("GET /api/events?after=0" + many + " HTTP/1.1\r\nHost: a\r\n\r\n");
                }
                Wait.until("all view", () -> Servers.one().metric("threefold_sse_subscribers") >= 150);
                long each = (heapInUse() - before) / 150;
                assertTrue(each < 60_000, "expected less than 60 KB for each, saw " + each + " bytes");
            } finally {
                for (RawConnection wire : open) wire.close();
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
            try (Instance board = new Instance("full", Servers.environment(Servers.newDatabase()))) {
                List<RawConnection> viewers = new ArrayList<>();
                try {
                    for (int i = 0; i < Events.MAX_SUBSCRIBERS; i++) {
                        viewers.add(board.wire());
                        viewers.getLast().send(HttpTest.request("GET", "/api/events?after=0"));
                    }
                    for (RawConnection viewer : viewers) viewer.read(true).expect(200);
                    assertEquals(Events.MAX_SUBSCRIBERS, board.metric("threefold_sse_subscribers"));
                    board.get("/api/events").unavailable();
                    board.say("a", "still served").expect(201);
                } finally {
                    for (RawConnection viewer : viewers) viewer.close();
                }
            }
        }
    }

    /** With its own way to Redis, so that only this board sees it break. */
    @Nested class When_Redis {
        private Map<String, String> by(FaultProxy cable) {
            Map<String, String> environment = new HashMap<>(Servers.environment(Servers.newDatabase()));
            environment.put("REDIS_PORT", "" + cable.port());
            return environment;
        }

        @Test void was_away_all_messages_are_told_when_it_is_back() throws Exception {
            try (FaultProxy cable = new FaultProxy(Servers.redisPort()); Instance board = new Instance("cut", by(cable));
                    Subscriber viewer = new Subscriber(board, "")) {
                board.awaitReady();
                viewer.awaits(board.say("a", "before").expect(201));
                cable.cut();
                Wait.until("it is noticed", () -> board.get("/readyz").text("status").equals("degraded"));
                List<Answer> meanwhile = new ArrayList<>();
                for (int i = 0; i < 5; i++) meanwhile.add(board.say("a", "meanwhile " + i).expect(201));
                cable.mend();
                Answer after = board.say("a", "after").expect(201);
                for (Answer one : meanwhile) viewer.awaits(one);
                viewer.awaits(after);
            }
        }

        @Test void hung_for_a_while_all_messages_are_told_when_it_goes_on() throws Exception {
            try (FaultProxy cable = new FaultProxy(Servers.redisPort()); Instance board = new Instance("hung", by(cable));
                    Subscriber viewer = new Subscriber(board, "")) {
                board.awaitReady();
                viewer.awaits(board.say("a", "before").expect(201));
                cable.hang();
                List<Answer> meanwhile = new ArrayList<>();
                meanwhile.add(board.say("a", "at first").expect(201));
                Wait.until("it is noticed", () -> board.get("/readyz").text("status").equals("degraded"));
                for (int i = 0; i < 3; i++) meanwhile.add(board.say("a", "meanwhile " + i).expect(201));
                board.get("/").expect(200);
                Thread.sleep(400); // several turns of the teller, which nobody can ask how far it is
                cable.mend();
                for (Answer one : meanwhile) viewer.awaits(one);
            }
        }
    }
}
