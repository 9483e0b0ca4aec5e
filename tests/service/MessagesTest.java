import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

import java.net.URLEncoder;
import java.time.Duration;
import java.time.Instant;
import java.util.*;
import java.util.concurrent.Callable;
import java.util.stream.IntStream;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.*;

/** Messages: stored once, returned to the character, listed by keyset pagination. */
@ExtendWith(LogCapture.class)
class MessagesTest {
    static final String SMILE = "\uD83D\uDE42";

    static List<String> texts() {
        return List.of("plain", "Zażółć gęślą jaźń", "Ελληνικά", "Русский", "עברית מימין", "العربية من اليمين",
                "हिन्दी", "ไทย", "中文字符", "日本語のテキスト",
                "한국어", "𝔐𝔞𝔱𝔥 𐍈 𒀀", SMILE + "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇪🇺", "e\u0301 versus \u00e9", "a\u0308\u0323\u0301",
                        "\u202Eright to left\u202C\u200F",
                "zero\u200Bwidth\u200Djoiner\uFEFF", "  leading", "trailing \t ", "\n\nlines\nand\r\nlines\r",
                        "tab\tand \u00a0 space", "\u2028\u2029",
                "quotes \" ' ` \\ \\n \\u0041", "<script>alert(1)</script> &amp; & %41 + %",
                        "'; DROP TABLE messages; --", "$1 {0} %s ${x} {{x}}", "{\"a\":[1]}", "{a,b,NULL}", "NULL",
                                "\uFFFD \uFFFE \uFFFF \uD83F\uDFFF",
                "\u0001\u0008\u001b[31m\u007f\u0085", "0", "-", ".");
    }

    static String encoded(String text) { return URLEncoder.encode(text, UTF_8); }

    static List<Answer> stored(Caller from, String query) {
        return from.get("/api/messages" + query).expect(200).json().getAsJsonArray("messages").asList().stream()
                .map(one -> new Answer(200, Map.of(), one.toString())).toList();
    }

    static List<Long> ids(JsonObject page) {
        return page.getAsJsonArray("messages").asList().stream()
                .map(one -> one.getAsJsonObject().get("id").getAsLong()).toList();
    }

    static String next(JsonObject page) { return page.get("next").isJsonNull() ? null : page.get("next")
            .getAsString(); }

    @Nested class A_text {
        static List<String> texts() { return MessagesTest.texts(); }

        @ParameterizedTest @MethodSource("texts") void comes_back_exactly_as_it_was_sent(String text) {
            String author = text.matches("\\p{IsWhite_Space}+") ? "white" : text;
            Answer sent = Servers.one().save(author, text + "!").expect(201);
            Answer read = Servers.three().get(1).get(sent.header("location")).expect(200);
            assertEquals(author, sent.text("author"));
            assertEquals(text + "!", sent.text("body"));
            assertEquals(sent.json(), read.json());
            assertEquals(text + "!", stored(Servers.three().get(2), "?limit=1").getFirst().text("body"));
        }

        @ParameterizedTest @MethodSource("texts") void comes_back_from_the_form_too(String text) {
            String author = UUID.randomUUID().toString();
            Servers.one().form("author=" + author + "&body=" + encoded(text + "!")).expect(303);
            Answer newest = stored(Servers.one(), "?limit=1").getFirst();
            assertEquals(List.of(author, text + "!"), List.of(newest.text("author"), newest.text("body")));
        }

        @Test void of_2000_characters_beyond_16_bits_is_taken() {
            String text = SMILE.repeat(2_000);
            assertEquals(text, Servers.one().save(SMILE.repeat(80), text).expect(201).text("body"));
        }

        @Test void may_be_escaped_in_json() {
            assertEquals("é" + SMILE + "/\n", Servers.one()
                    .post("{\"author\":\"a\",\"body\":\"\\u00e9\\uD83D\\uDE42\\/\\n\"}").expect(201).text("body"));
        }
    }

    @Nested class An_author {
        @ParameterizedTest @ValueSource(strings = {"a", "é", SMILE, "字"})
        void has_80_characters_at_most(String character) {
            Servers.one().save(character.repeat(80), "b").expect(201);
            Servers.one().save(character.repeat(81), "b").problem(422, "author");
            Servers.one().form("author=" + encoded(character.repeat(80)) + "&body=b").expect(303);
            Servers.one().form("author=" + encoded(character.repeat(81)) + "&body=b").problem(422, "author");
        }

        @Test void is_measured_without_the_space_around_it_and_stored_with_it() {
            String author = "  " + "a".repeat(80) + "\n\t ";
            assertEquals(author, Servers.one().save(author, "b").expect(201).text("author"));
        }

        /** White space does not count for the length: a hundred messages of 32 KB would not fit into memory. */
        @ParameterizedTest @ValueSource(strings = {" ", "\u00a0"})
        void has_at_most_1000_characters_of_space_around_it(String space) {
            String most = space.repeat(500) + "b" + space.repeat(500);
            assertEquals(most, Servers.one().save("a", most).expect(201).text("body"));
            Servers.one().save("a", most + space).problem(422, "body", "white space");
            Servers.one().form("author=a&body=" + encoded(most + space)).problem(422, "body");
        }
    }

    @Nested class A_body {
        @ParameterizedTest @ValueSource(strings = {"b", "é", SMILE, "字"})
        void has_2000_characters_at_most(String character) {
            Servers.one().save("a", character.repeat(2_000)).expect(201);
            Servers.one().save("a", character.repeat(2_001)).problem(422, "body");
        }
    }

    @Nested class A_field {
        /** Unicode's White_Space; the page and its test have the same list. */
        static final String WHITE = "\t\n\u000b\f\r \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
                + "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000";

        @Test void is_measured_without_white_space_and_nothing_else() {
            for (int c = 1; c <= Character.MAX_VALUE; c++) {
                if (Character.isSurrogate((char) c)) continue;
                String one = "" + (char) c, around = one + "a".repeat(80) + one;
                assertEquals(WHITE.contains(one), one.matches("\\p{IsWhite_Space}"), "U+" + Integer.toHexString(c));
                assertEquals(WHITE.contains(one), refused(one, "b") && refused(one + one, "b"),
                        "empty: U+" + Integer.toHexString(c));
                assertEquals(WHITE.contains(one), !refused(around, "b"), "trimmed: U+" + Integer.toHexString(c));
            }
        }

        private static boolean refused(String author, String body) {
            try {
                return !new NewMessage(author, body).author().equals(author);
            } catch (InvalidInput invalid) { return true; }
        }

        static List<String> white() { return WHITE.chars().mapToObj(c -> "" + (char) c).toList(); }

        @ParameterizedTest @MethodSource("white") void of_white_space_alone_is_empty(String white) {
            Servers.one().save("a", white).problem(422, "body", "empty");
            Servers.one().form("author=a&body=" + encoded(white + white)).problem(422, "body");
        }

        @ParameterizedTest @ValueSource(strings = {"\u001c", "\u001f", "\u180e", "\u200b", "\u2060", "\ufeff"})
        void of_what_is_not_white_space_is_not_empty(String text) {
            assertEquals(text, Servers.one().save("a", text).expect(201).text("body"));
        }

        @ParameterizedTest @ValueSource(strings = {"", " ", "\n", " \t\r\n ", "\u2003\u3000", "\u00a0", "\u0085 "})
        void that_is_empty_is_named(String empty) {
            Servers.one().save(empty, "b").problem(422, "author");
            Servers.one().save("a", empty).problem(422, "body");
            Servers.one().save(empty, empty).problem(422, "author", "body");
            Servers.one().form("author=a&body=" + encoded(empty)).problem(422, "body");
        }

        @Test void that_is_missing_is_named() {
            Servers.one().post("{\"author\":\"a\"}").problem(422, "body");
            Servers.one().post("{\"body\":\"b\"}").problem(422, "author");
            Servers.one().post("{}").problem(422, "author", "body");
            Servers.one().form("author=a").problem(422, "body");
            Servers.one().form("").problem(422, "author", "body");
        }

        @Test void that_is_wrong_has_an_error_of_its_own() {
            assertEquals("{\"body\":\"body is empty\"}",
                    "" + Servers.one().save("a", "").problem(422).json().get("errors"));
            assertEquals("{\"author\":\"author is missing\",\"body\":\"body is missing\"}",
                    "" + Servers.one().post("{}").problem(422).json().get("errors"));
        }
    }

    @Nested class A_stored_message {
        @Test void has_its_location_its_instance_and_its_time() {
            Instant before = Instant.now().minusSeconds(5);
            Answer sent = Servers.three().get(1).save("ann", "hello").expect(201);
            assertEquals(Set.of("id", "author", "body", "instance", "createdAt"), sent.json().keySet());
            assertEquals("/api/messages/" + sent.id(), sent.header("location"));
            assertEquals("web2", sent.text("instance"));
            Instant at = Instant.parse(sent.text("createdAt"));
            assertTrue(at.isAfter(before) && at.isBefore(Instant.now().plusSeconds(5)), "" + at);
            assertEquals(sent.json(), Servers.three().get(2).get(sent.header("location")).expect(200).json());
        }

        @Test void is_in_the_database_when_it_is_acknowledged() {
            Answer sent = Servers.one().save("ann", "durable").expect(201);
            assertEquals(List.of("durable"), Servers.sql(Servers.database(), "SELECT body FROM messages WHERE id = "
                    + sent.id()));
        }

        @ParameterizedTest @ValueSource(strings = {"0", "-1", "999999999999999999", "9223372036854775807",
                "9223372036854775808", "99999999999999999999999", "abc", "1.0", "1e3",
                "+1", "01", "%31%20", "0x1", "null", "%00", "1%00", "..", "%2e%2e", "١", "%D9%A1", "1,2", "*"})
        void is_not_found_under_an_odd_id(String id) throws Exception {
            Answer answer = Servers.one().raw(HttpTest.request("GET", "/api/messages/" + id));
            if (id.equals("١")) assertTrue(answer.status() == 400 || answer.status() == 404, "" + answer);
            else answer.problem(404);
        }
    }

    /** On a board of its own with 25 messages. */
    @Nested class The_list {
        private static final List<Long> all = new ArrayList<>();
        private static Instance board;

        @BeforeAll static void fill() {
            board = new Instance("lister");
            assertEquals("{\"messages\":[],\"next\":null,\"cursor\":\"0-0\"}",
                    board.get("/api/messages").expect(200).body());
            for (int i = 0; i < 25; i++) all.addFirst(board.save("a", "message " + i).expect(201).id());
        }

        @AfterAll static void close() { board.close(); }

        static JsonObject page(String query) { return board.get("/api/messages" + query).expect(200).json(); }

        @Test void has_20_of_them_the_newest_first() {
            JsonObject page = page("");
            assertEquals(all.subList(0, 20), ids(page));
            assertEquals(all.subList(20, 25), ids(page("?" + next(page).split("\\?")[1])));
        }

        @ParameterizedTest @ValueSource(ints = {1, 7, 24, 25, 26, 100})
        void walked_page_by_page_shows_each_once(int limit) {
            List<Long> seen = new ArrayList<>();
            int pages = 0;
            for (String path = "/api/messages?limit=" + limit; path != null; pages++) {
                JsonObject page = board.get(path).expect(200).json();
                assertTrue(ids(page).size() <= limit && !ids(page).isEmpty(), path + ": " + page);
                seen.addAll(ids(page));
                path = next(page);
            }
            assertEquals(all, seen);
            assertEquals((25 + limit - 1) / limit, pages, "pages");
        }

        @Test void can_begin_before_any_id() {
            assertEquals(all.subList(11, 14), ids(page("?limit=3&before=" + all.get(10))));
            assertEquals(List.of(), ids(page("?before=" + all.getLast())));
            assertNull(next(page("?before=" + all.getLast())));
            assertEquals(all.subList(0, 2), ids(page("?limit=2&before=" + (all.getFirst() + 1_000))));
        }

        @ParameterizedTest @ValueSource(strings = {"limit=0", "limit=101", "limit=-1", "limit=abc", "limit=",
                "limit", "limit=1.5", "limit=%2B5", "limit=99999999999999999999",
                "limit=%00", "limit=%D9%A1", "limit=1%202", "before=abc", "before=", "before=-1", "before=0x1",
                        "before=99999999999999999999", "before=1&limit=x", "limit=5&before=%00"})
        void refuses_a_parameter_out_of_range(String query) {
            board.get("/api/messages?" + query).problem(400, query.contains("limit=5") || !query.contains("limit")
                    ? "before" : "limit");
        }

        @Test void takes_the_edges_of_the_range() {
            assertEquals(1, ids(page("?limit=1")).size());
            assertEquals(25, ids(page("?limit=100&unknown=1")).size());
        }

        @Test void stays_the_same_below_an_id_while_others_write() throws Exception {
            Instance busy = Servers.one();
            long start = busy.save("pager", "the newest so far").expect(201).id();
            List<Long> mine = new ArrayList<>();
            for (int i = 0; i < 30; i++) mine.addFirst(busy.save("pager", "mine " + i).expect(201).id());
            Callable<Set<Long>> walk = () -> {
                List<Long> seen = new ArrayList<>();
                for (String path = "/api/messages?limit=3"; path != null
                        && (seen.isEmpty() || seen.getLast() > start); ) {
                    JsonObject page = Servers.three().get(1).get(path).expect(200).json();
                    seen.addAll(ids(page));
                    path = next(page);
                }
                assertEquals(seen.stream().distinct().sorted(Comparator.reverseOrder()).toList(), seen,
                        "each once, newest first");
                return new HashSet<>(seen);
            };
            Callable<Set<Long>> write = () -> {
                for (int i = 0; i < 60; i++) Servers.three().get(2).save("pager", "meanwhile " + i).expect(201);
                return new HashSet<>(mine);
            };
            for (Set<Long> seen : Wait.together(List.of(walk, write, walk))) assertTrue(seen.containsAll(mine),
                    "expected " + mine + ", actual: " + seen);
        }

        @ParameterizedTest @ValueSource(ints = {0, 1, 2, 3, 10})
        void has_what_another_instance_stored_however_often_it_was_read_before(int times) {
            Instance reader = Servers.three().get(1), writer = Servers.three().get(2);
            for (int i = 0; i < times; i++) reader.get("/api/messages?limit=2").expect(200);
            for (int i = 0; i < 3; i++) {
                long id = writer.save("a", "read " + times + " times before").expect(201).id();
                assertEquals(id, ids(reader.get("/api/messages?limit=2").expect(200).json()).getFirst());
            }
        }

        @Test void is_read_with_others_up_to_two_hundred_rows() throws Exception {
            Config config = Config.from(Servers.environment(Servers.newDatabase()));
            try (Postgres postgres = new Postgres(config);
                    Messages messages = new Messages(postgres, "reader", new Metrics())) {
                messages.probe(); // creates the schema
                List<PageQuery> three = List.of(new PageQuery(9, 100), new PageQuery(8, 100), new PageQuery(7, 1));
                assertEquals(2, messages.pages(three).size());
            }
        }

        @Test void answers_many_different_queries_at_once() throws Exception {
            List<Callable<List<Long>>> queries = new ArrayList<>();
            for (int i = 0; i < 60; i++) {
                int limit = 1 + i % 7, from = i % 20;
                queries.add(() -> ids(page("?limit=" + limit + "&before=" + all.get(from))));
            }
            List<List<Long>> answers = Wait.together(queries);
            for (int i = 0; i < 60; i++) assertEquals(all.subList(i % 20 + 1, Math.min(25, i % 20 + 2 + i % 7)),
                    answers.get(i), "query " + i);
        }
    }

    @Nested class A_database {
        @Test void that_is_empty_gets_its_schema_from_the_first_of_three_instances() throws Exception {
            String database = Servers.newDatabase();
            List<Instance> three = new ArrayList<>();
            try {
                for (String name : List.of("new1", "new2", "new3")) three.add(new Instance(name, database));
                List<Callable<Answer>> first = new ArrayList<>();
                for (Instance one : three) first.add(() -> one.save("a", "first of " + one.name));
                Wait.together(first).forEach(answer -> answer.expect(201));
                for (Instance one : three) assertEquals(3, stored(one, "").size());
            } finally { three.forEach(Instance::close); }
        }

        @Test void that_is_older_keeps_its_messages() {
            String database = Servers.newDatabase();
            try (Instance one = new Instance("older", database)) { one.save("a", "from before").expect(201); }
            try (Instance two = new Instance("newer", database)) {
                assertEquals("from before", stored(two, "").getFirst().text("body"));
            }
        }
    }

    @Nested class A_form {
        private static final String[] BROWSER = {"Accept", "text/html,application/xhtml+xml,*/*;q=0.8"};

        @Test void leads_back_to_the_page() {
            Answer answer = Servers.one().form("author=ann&body=from+the+page", BROWSER).expect(303);
            assertEquals("/", answer.header("location"));
            assertTrue(Servers.one().get("/", BROWSER).body().contains("from the page"));
        }

        @Test void may_name_its_charset() {
            Servers.one().send("POST", "/api/messages", "author=a&body=b".getBytes(UTF_8), "Content-Type",
                    Caller.FORM + "; charset=UTF-8").expect(303);
        }

        @Test void in_multipart_is_not_understood() {
            String body = "--x\r\nContent-Disposition: form-data; name=\"author\"\r\n\r\na\r\n--x--\r\n";
            Servers.one().send("POST", "/api/messages", body.getBytes(UTF_8), "Content-Type",
                    "multipart/form-data; boundary=x").problem(415);
        }

        @Test void keeps_what_was_typed_if_it_is_rejected() {
            Answer page = Servers.one().form("author=" + encoded("<Ann & \"Bob\">") + "&body=" + "b".repeat(2_001),
                    BROWSER).expect(422);
            assertTrue(page.header("content-type").startsWith("text/html"), "" + page);
            assertTrue(page.body().contains("<title>Not stored ")
                    && page.body().contains("value=\"&lt;Ann &amp; &quot;Bob&quot;&gt;\"")
                    && page.body().contains("b".repeat(2_001)) && !page.body().contains("<Ann"), "" + page);
            assertEquals("web1", page.header("x-instance-id"));
            Answer empty = Servers.one().form("author=&body=" + encoded("a text that took an hour"), BROWSER)
                    .expect(422);
            assertTrue(empty.body().contains("a text that took an hour"), "" + empty);
        }

        @Test void that_is_rejected_leaves_no_memory_reserved() {
            try (Instance board = new Instance("returned")) {
                board.awaitReady();
                for (int i = 0; i < 3; i++) board.form("author=a&body=", BROWSER).expect(422);
                Wait.until("all is released", () -> board.metric("threefold_buffered_bytes") == 0);
            }
        }

        @Test void of_a_program_gets_a_problem() { Servers.one().form("author=a&body=").problem(422, "body"); }

        @ParameterizedTest @ValueSource(strings = {"%", "%4", "%zz", "%u0041", "a%", "%%", "%-1", "%+1", "% 1"})
        void with_bad_percent_encoding_is_refused(String text) {
            Servers.one().form("author=a&body=x" + text).problem(400);
            assertTrue(Servers.one().form("author=a&body=x" + text, BROWSER).expect(400).header("content-type")
                    .startsWith("text/html"));
        }

        @ParameterizedTest @ValueSource(strings = {"%ff", "%c0%80", "%e2%82", "%ed%a0%80", "%80", "%f4%90%80%80",
                "%00", "a%00b"})
        void with_bytes_that_are_no_text_is_refused(String text) {
            Servers.one().form("author=a&body=x" + text).problem(400);
            Servers.one().form("author=x" + text + "&body=b").problem(400);
        }

        @Test void with_raw_bytes_that_are_no_utf_8_is_refused() {
            Servers.one().send("POST", "/api/messages", "author=a&body=naïve".getBytes(ISO_8859_1), "Content-Type",
                    Caller.FORM).problem(400);
        }

        @ParameterizedTest @ValueSource(strings = {"naïve", "日本語", SMILE, "mixed é and %C3%A9"})
        void with_raw_utf_8_as_curl_sends_it_is_understood(String text) {
            Servers.one().form("author=raw&body=" + text).expect(303);
            assertEquals(text.replace("%C3%A9", "é"), stored(Servers.one(), "?limit=1").getFirst().text("body"));
        }

        @Test void with_a_field_twice_is_refused() {
            Servers.one().form("author=a&body=b&body=c").problem(400);
            Servers.one().form("author=a&author=a&body=b").problem(400);
        }

        @ParameterizedTest @ValueSource(strings = {"author=a&body=b&more=1", "&&author=a&&body=b&",
                "x&author=a&body=b&=", "body=b&author=a"})
        void with_more_fields_is_taken(String form) {
            Servers.one().form(form).expect(303);
        }

        @Test void keeps_equals_signs_and_line_ends() {
            Servers.one().form("author=a&body=1%2B1=2+=%0D%0A%26").expect(303);
            assertEquals("1+1=2 =\r\n&", stored(Servers.one(), "?limit=1").getFirst().text("body"));
        }

        @Test void that_is_too_large_gets_413() {
            Servers.one().form("author=a&body=" + "x".repeat(40_000)).problem(413);
        }

        @Test void with_a_key_is_stored_once() {
            String key = UUID.randomUUID().toString();
            for (Instance instance : Servers.three()) instance.form("author=keyed&body=" + key, "Idempotency-Key",
                    key).expect(303);
            assertEquals(1, stored(Servers.one(), "?limit=100").stream().filter(one -> one.text("body").equals(key))
                    .count());
        }
    }

    @Nested class The_page {
        @Test void keeps_a_bare_carriage_return() { // for which a browser would read a line end
            Servers.one().save("a", "one\rtwo").expect(201);
            String page = Servers.one().get("/", "Accept", "text/html").expect(200).body();
            assertTrue(page.contains("one&#13;two"), page);
        }

        @Test void shows_the_share_of_each_instance_by_name_and_the_time_of_each_message() {
            Message stored = new Message(7, "a", "b", "web2", Instant.parse("2026-01-02T15:04:05.678Z"));
            String page = new String(new HtmlPage().render("web2", 9L, new Counts(8L, Map.of("web10", 6L, "web2", 2L)),
                    MessagePage.of(PageQuery.NEWEST, List.of(stored), Cursor.EARLIEST), PageQuery.NEWEST, List.of(),
                    Form.EMPTY), UTF_8);
            int two = page.indexOf(">25.0%<"), ten = page.indexOf(">75.0%<");
            assertTrue(two > 0 && ten > two, "expected web2, with 25 %, before web10, with 75 %, actual: " + page);
            assertTrue(page.contains(">2 Jan 2026, 15:04:05 UTC<"), page);
            assertTrue(page.contains("<title>web2 "), page);
        }

        @Test void shows_messages_as_text_and_not_as_html() {
            Servers.one().save("<b>eve</b>", "<script>alert('x')</script>\"'&").expect(201);
            Answer page = Servers.one().get("/", "Accept", "text/html");
            assertFalse(page.body().contains("<script>alert"), "" + page);
            assertTrue(page.body().contains("&lt;script&gt;alert"), "" + page);
            assertFalse(page.body().contains("<b>eve"), "" + page);
            assertTrue(page.header("content-security-policy").contains("default-src"), "" + page);
        }
    }

    @Nested class An_idempotency_key {
        private static final String KEY = "Idempotency-Key", PROXY = "X-Proxy-Request-Id";

        static String key() { return UUID.randomUUID().toString(); }

        static long count(String body) {
            return stored(Servers.one(), "?limit=100").stream().filter(one -> one.text("body").equals(body)).count();
        }

        @Test void gives_the_same_message_from_every_instance() {
            String key = key();
            Answer first = Servers.one().save("a", key, KEY, key).expect(201);
            assertNull(first.header("idempotency-replayed"));
            for (Instance instance : Servers.three()) {
                Answer again = instance.save("a", key, KEY, key).expect(200);
                assertEquals("true", again.header("idempotency-replayed"));
                assertEquals(first.json(), again.json());
                assertEquals(first.header("location"), again.header("location"));
            }
            assertEquals(1, count(key));
        }

        @Test void gives_422_to_another_message() {
            String key = key();
            Servers.one().save("a", key, KEY, key).expect(201);
            for (Instance instance : Servers.three()) {
                instance.save("a", key + "!", KEY, key).problem(422, KEY);
                instance.save("b", key, KEY, key).problem(422, KEY);
                instance.save("a", key + " ", KEY, key).problem(422, KEY);
            }
            assertEquals(0, count(key + "!"));
            Servers.one().save("a", key, KEY, key).expect(200);
        }

        @Test void is_not_used_up_by_a_rejected_message() {
            String key = key();
            Servers.one().save("a", "", KEY, key).problem(422);
            Servers.one().post("{", KEY, key).problem(400);
            Servers.one().save("a", "now it is right", KEY, key).expect(201);
        }

        @Test void used_by_50_at_once_stores_one() throws Exception {
            for (int round = 0; round < 3; round++) {
                String key = key();
                List<Callable<Answer>> senders = new ArrayList<>();
                for (int i = 0; i < 50; i++) {
                    Instance instance = Servers.three().get(i % 3);
                    senders.add(() -> instance.save("a", key, KEY, key));
                }
                List<Answer> answers = Wait.together(senders);
                assertEquals(List.of(1L, 49L), List.of(answers.stream().filter(answer -> answer.status() == 201)
                        .count(), answers.stream().filter(answer -> answer.status() == 200
                                && "true".equals(answer.header("idempotency-replayed"))).count()));
                assertEquals(1, answers.stream().map(Answer::json).distinct().count());
                assertEquals(1, count(key));
            }
        }

        @Test void used_at_once_for_different_messages_stores_one_and_rejects_the_others() throws Exception {
            String key = key();
            List<Callable<Answer>> senders = new ArrayList<>();
            for (int i = 0; i < 24; i++) {
                String body = key + " " + i % 4;
                Instance instance = Servers.three().get(i % 3);
                senders.add(() -> instance.save("a", body, KEY, key));
            }
            Map<Integer, Integer> byStatus = new HashMap<>();
            Wait.together(senders).forEach(answer -> byStatus.merge(answer.status(), 1, Integer::sum));
            assertEquals(Map.of(201, 1, 200, 5, 422, 18), byStatus);
        }

        static List<String> bad() {
            return List.of("", "a b", "k\tk", "k".repeat(256), "ключ", "é", " ", SMILE);
        }

        @ParameterizedTest @MethodSource("bad") void that_is_none_is_refused(String key) throws Exception {
            byte[] body = Caller.message("a", "with a bad key").getBytes(UTF_8);
            Servers.one().raw(HttpTest.post(body, KEY + ": " + key)).problem(400, KEY);
        }

        @Test void given_twice_is_refused() throws Exception {
            byte[] body = Caller.message("a", "with two keys").getBytes(UTF_8);
            String key = key();
            for (String other : List.of(key, key(), ""))
                for (List<String> two : List.of(List.of(key, other), List.of(other, key)))
                    Servers.one().raw(HttpTest.post(body, KEY + ": " + two.get(0), KEY + ": " + two.get(1)))
                            .problem(400, KEY);
            assertEquals(0, count("with two keys"));
        }

        @ParameterizedTest @ValueSource(strings = {"!", "~", "\"quoted\"", "c:x", "p:x", "a,b", "';--", "%00", "{a}"})
        void may_be_any_visible_ascii(String key) {
            String unique = key + key().substring(0, 8);
            Servers.one().save("a", unique, KEY, unique).expect(201);
            Servers.three().get(1).save("a", unique, KEY, unique).expect(200);
        }

        @Test void may_have_255_characters_that_all_matter() {
            String key = key() + "k".repeat(218);
            Servers.one().save("a", "1", KEY, key + "x").expect(201);
            Servers.one().save("a", "2", KEY, key + "y").expect(201);
            Servers.one().save("a", "3", KEY, key + "X").expect(201);
        }

        @Test void of_the_proxy_stores_once_and_is_no_replay_for_the_client() {
            String id = key();
            Answer first = Servers.one().save("a", id, PROXY, id).expect(201), second = Servers.three().get(1)
                    .save("a", id, PROXY, id).expect(201);
            assertEquals(first.json(), second.json());
            assertNull(second.header("idempotency-replayed"));
            assertEquals(1, count(id));
        }

        @ParameterizedTest @ValueSource(strings = {"", "a b"})
        void of_the_proxy_that_is_none_is_not_used(String id) throws Exception {
            for (String body : List.of("the one", "another")) {
                byte[] json = Caller.message("a", body).getBytes(UTF_8);
                Servers.one().raw(HttpTest.post(json, PROXY + ": " + id)).expect(201);
            }
        }

        @Test void of_the_proxy_and_of_a_client_are_not_the_same() {
            String key = key();
            long first = Servers.one().save("a", "client", KEY, key).expect(201).id();
            long second = Servers.one().save("a", "proxy", PROXY, key).expect(201).id();
            long third = Servers.one().save("a", "client, by way of the proxy", KEY, key + "2", PROXY, key).expect(201)
                    .id();
            assertEquals(3, Set.of(first, second, third).size());
            for (String forged : List.of("p:" + key, "c:" + key, "s:" + key))
                Servers.one().save("a", "forged", KEY, forged).expect(201);
        }

        @Test void is_not_needed_to_send_the_same_text_twice() {
            String text = key();
            assertNotEquals(Servers.one().save("a", text).expect(201).id(), Servers.one().save("a", text).expect(201)
                    .id());
        }

        /** Two statements that lock the same rows in different orders would deadlock. */
        @Test void in_two_large_batches_at_once_causes_no_deadlock() throws Exception {
            Config config = Config.from(Servers.environment(Servers.newDatabase()));
            try (Postgres first = new Postgres(config); Postgres second = new Postgres(config);
                    Messages one = new Messages(first, "one", new Metrics());
                    Messages other = new Messages(second, "other", new Metrics())) {
                one.probe(); // creates the schema
                for (int round = 0; round < 5; round++) {
                    List<SaveRequest> batch = new ArrayList<>(Stream.generate(() -> new SaveRequest(
                            new IdempotencyKey(key(), true), new NewMessage("a", "b"))).limit(500).toList()),
                            reversed = new ArrayList<>(batch);
                    Collections.reverse(reversed);
                    for (List<SaveResult> saved : Wait.<List<SaveResult>>together(List.of(
                            () -> one.save(batch), () -> other.save(reversed))))
                        assertTrue(saved.stream().allMatch(result -> result.rejection() == null), "round " + round);
                }
            }
        }

        @Test void and_others_in_opposite_order_on_two_instances_do_not_deadlock() throws Exception {
            for (int round = 0; round < 5; round++) {
                List<String> keys = new ArrayList<>(Stream.generate(An_idempotency_key::key).limit(60).toList()),
                        reversed = new ArrayList<>(keys);
                Collections.reverse(reversed);
                List<Callable<Answer>> senders = new ArrayList<>();
                for (int i = 0; i < 60; i++) {
                    String one = keys.get(i), other = reversed.get(i);
                    senders.add(() -> Servers.three().get(0).save("a", one, KEY, one));
                    senders.add(() -> Servers.three().get(1).save("a", other, KEY, other));
                }
                Map<Integer, Integer> byStatus = new HashMap<>();
                Wait.together(senders).forEach(answer -> byStatus.merge(answer.status(), 1, Integer::sum));
                assertEquals(Map.of(201, 60, 200, 60), byStatus, "round " + round);
            }
        }
    }
}
