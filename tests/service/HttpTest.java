import com.google.gson.*;
import org.junit.jupiter.api.Nested;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

import java.io.ByteArrayOutputStream;
import java.io.EOFException;
import java.util.*;
import java.util.concurrent.Callable;
import java.util.function.Supplier;
import java.util.stream.*;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.*;

/** The routes, and what the service returns for valid, odd and malformed requests. */
@ExtendWith(LogCapture.class)
class HttpTest {
    static final int MAX_BODY = 32 * 1024;
    private static String stored;

    /** The paths of the routes, the one with a parameter as that of a stored message. */
    static synchronized List<String> paths() {
        if (stored == null) stored = Servers.one().save("router", "a message").expect(201)
                .header("location");
        return Servers.one().service.routes().stream().map(Route::path).distinct()
                .map(path -> path.equals("/api/messages/{id}") ? stored : path).toList();
    }

    static String template(String path) { return path.equals(stored) ? "/api/messages/{id}" : path; }

    /** The methods that the routes allow for a path. */
    static Set<String> allowed(String path) {
        Set<String> methods = Servers.one().service.routes().stream()
                .filter(route -> route.path().equals(template(path))).map(Route::method)
                .collect(Collectors.toCollection(TreeSet::new));
        if (methods.contains("GET")) methods.add("HEAD");
        methods.add("OPTIONS");
        return methods;
    }

    static Set<String> allowHeader(Answer answer) {
        assertNotNull(answer.header("allow"), "Allow in " + answer);
        return new TreeSet<>(Arrays.asList(answer.header("allow").split(",\\s*")));
    }

    static String request(String method, String path, String... headers) {
        return method + " " + path + " HTTP/1.1\r\nHost: localhost\r\n"
                + Stream.of(headers).map(header -> header + "\r\n").collect(Collectors.joining()) + "\r\n";
    }

    static String post(byte[] body, String... headers) {
        return request("POST", "/api/messages", Caller.and(headers, "Content-Type: application/json",
                "Content-Length: " + body.length)) + new String(body, ISO_8859_1);
    }

    /** A message whose JSON has exactly so many bytes. */
    static byte[] sized(int bytes) {
        String start = "{\"author\":\"scales\",\"body\":\"weighed\",\"ballast\":\"";
        return (start + "x".repeat(bytes - start.length() - 2) + "\"}").getBytes(UTF_8);
    }

    static String chunked(byte[] body, int size, String... headers) {
        StringBuilder text = new StringBuilder(request("POST", "/api/messages",
                Caller.and(headers, "Content-Type: application/json", "Transfer-Encoding: chunked")));
        for (int at = 0; at < body.length; at += size) {
            int length = Math.min(size, body.length - at);
            text.append(Integer.toHexString(length)).append("\r\n").append(new String(body, at, length, ISO_8859_1))
                    .append("\r\n");
        }
        return text.append("0\r\n\r\n").toString();
    }

    @Nested class Every_answer {
        static List<String> paths() { return HttpTest.paths(); }

        @ParameterizedTest @MethodSource("paths")
        void names_its_instance_and_its_request(String path) throws Exception {
            for (Instance instance : Servers.three())
                try (RawConnection connection = instance.connect()) {
                    String method = allowed(path).contains("GET") ? "GET" : "OPTIONS";
                    connection.send(request(method, path, "Accept: */*"));
                    Answer head = connection.read(true);
                    assertTrue(head.status() < 300, "" + head);
                    assertEquals(instance.name, head.header("x-instance-id"));
                    assertTrue(head.header("x-request-id").matches("[A-Za-z0-9._:-]{8,100}"), "" + head);
                }
        }

        @Test void has_an_id_of_its_own() {
            Set<String> ids = new HashSet<>();
            for (int i = 0; i < 50; i++) ids.add(Servers.one().get("/healthz").header("x-request-id"));
            assertEquals(50, ids.size());
        }

        @Test void keeps_the_ids_also_if_it_is_an_error() {
            String[] id = {"X-Request-Id", "mine"};
            for (Answer error : List.of(Servers.one().get("/nowhere", id), Servers.one().post("{", id),
                    Servers.one().send("PUT", "/", null, id))) {
                assertEquals("mine", error.header("x-request-id"), "" + error);
                assertEquals("web1", error.header("x-instance-id"), "" + error);
            }
        }

        @ParameterizedTest @ValueSource(strings = {"a", "0af7651916cd43dd8448eb211c80319c", "A-b.c_d:e"})
        void keeps_a_valid_id_of_the_client(String id) {
            assertEquals(id, Servers.one().get("/healthz", "X-Request-Id", id).header("x-request-id"));
        }

        @Test void keeps_one_of_100_characters_and_no_longer_one() {
            String most = "x".repeat(100);
            assertEquals(most, Servers.one().get("/healthz", "X-Request-Id", most).header("x-request-id"));
            assertNotEquals(most + "x",
                    Servers.one().get("/healthz", "X-Request-Id", most + "x").header("x-request-id"));
        }

        @Test void forbids_to_guess_its_type() {
            for (String path : List.of("/", "/api/messages", "/nowhere"))
                assertEquals("nosniff", Servers.one().get(path).header("x-content-type-options"), path);
        }

        /** nginx sends its own id with every request, and logs it; an instance would log it again. */
        @Test void is_logged_if_the_client_chose_its_id() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                connection.send(request("GET", "/healthz", "X-Request-Id: of-nginx", "X-Proxy-Request-Id: of-nginx"));
                connection.read().expect(200);
                connection.send(request("GET", "/healthz", "X-Request-Id: of-client", "X-Proxy-Request-Id: of-nginx"));
                connection.read().expect(200);
            }
            Wait.until("it is in the log", () -> LogCapture.all().toString().contains("of-client"));
            assertFalse(LogCapture.all().toString().contains("of-nginx"), "" + LogCapture.last(5));
        }

        @ParameterizedTest @ValueSource(strings = {"", "a b", "<script>", "a\"b", "a,b", "é", "{}", "a\tb",
                "%0d%0aSet-Cookie:x"}) void replaces_an_invalid_one(String id) throws Exception {
            for (String one : List.of(id, id.isEmpty() ? "" : "x".repeat(5_000))) {
                Answer answer = Servers.one().raw(request("GET", "/healthz", "X-Request-Id: " + one)).expect(200);
                assertNotEquals(one, answer.header("x-request-id"));
                assertTrue(answer.header("x-request-id").matches("[A-Za-z0-9._:-]{8,100}"), "" + answer);
            }
        }

        @ParameterizedTest @MethodSource("paths") void is_not_kept_by_caches(String path) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                String cache = connection.send(request("GET", path)).read(true).header("cache-control");
                assertTrue(cache != null && (cache.contains("no-store") || path.equals("/openapi.json")),
                        path + ": " + cache);
            }
        }
    }

    @Nested class The_routes {
        static List<String> paths() { return HttpTest.paths(); }

        @ParameterizedTest @MethodSource("paths") void return_the_allowed_methods_of_a_path(String path) {
            Answer answer = Servers.one().send("OPTIONS", path, null);
            assertTrue(answer.status() == 200 || answer.status() == 204, "" + answer);
            assertEquals(allowed(path), allowHeader(answer));
        }

        @ParameterizedTest @MethodSource("paths") void reject_every_other_method(String path) throws Exception {
            for (String method : List.of("GET", "POST", "PUT", "PATCH", "DELETE", "PROPFIND", "BREW", "get"))
                if (!allowed(path).contains(method)) {
                    Answer answer = Servers.one().raw(request(method, path, "Content-Length: 0")).problem(405);
                    assertEquals(allowed(path), allowHeader(answer), method + " " + path);
                }
        }

        @ParameterizedTest @MethodSource("paths")
        void return_the_head_of_each_GET(String path) throws Exception {
            if (!allowed(path).contains("HEAD")) return;
            try (RawConnection connection = Servers.one().connect()) {
                connection.socket.setSoTimeout(3_000);
                Answer head = connection.send(request("HEAD", path)).read(true).expect(200);
                assertNotNull(head.header("content-type"));
                connection.send(request("GET", "/healthz")).read().expect(200); // a body would be in its way
            }
        }

        @ParameterizedTest @ValueSource(strings = {"/nowhere", "/api", "/api/", "/api/messages/1/2", "/favicon.txt",
                "/index.html", "/api/visits/1", "/healthz/x", "/Service.java", "/init.sql", "/API/visits", "/%00",
                "/a%00b", "/%2e%2e/etc/passwd", "/..", "/../../etc/passwd", "/%2F", "/api%2fvisits", "/..%5c",
                "/%F0%9F%99%82", "/%ff%fe", "/*",
                // A path has one spelling: a proxy that reads another one as another path could apply other limits.
                "/api/events;x=1", "/api/events;", "/api;x/events", "/;x", "/;x=1?limit=3", "/api/%65vents",
                "/api/messages;a?limit=1", "/%6detrics", "/metrics;x", "//metrics", "/./metrics", "/x/../metrics",
                "/metrics/", "/METRICS", "/api/events/", "/api//events", "/api/events%3Bx", "/api/events%3F",
                "http://localhost/metrics;x", "http://localhost/%6detrics"})
        void have_no_other_path(String path) throws Exception {
            Servers.one().raw(request("GET", path)).problem(404);
        }
    }

    @Nested class A_visit {
        @Test void of_a_program_is_answered_with_json() {
            Answer answer = Servers.one().get("/").expect(200);
            assertEquals(Set.of("instance", "visits"), answer.json().keySet());
            assertEquals("web1", answer.text("instance"));
            assertEquals("application/json", answer.header("content-type"));
        }

        @Test void of_a_browser_is_answered_with_the_page() {
            Answer page = Servers.one().get("/", "Accept",
                    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8").expect(200);
            assertTrue(page.header("content-type").startsWith("text/html"), "" + page);
            assertTrue(page.header("content-type").toLowerCase().contains("utf-8"), "" + page);
            assertTrue(page.body().contains("<form") && page.body().contains("web1"), "" + page);
        }

        /** As sent by real clients. */
        @ParameterizedTest @ValueSource(strings = {
                "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8,"
                        + "application/signed-exchange;v=b3;q=0.7", // Chrome
                "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", // Firefox, Safari
                "text/html, application/xhtml+xml, image/jxr, */*", // Internet Explorer
                "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", // Java
                "text/html", "TEXT/HTML", "text/*", "text/html;q=0.001", "text/html ; Q=0.5", "text/html;charset=utf-8",
                "text/html;charset=\"UTF-8\"", "application/json;q=0.1, text/html;q=0.2",
                "text/html, application/json", "application/json, text/html", "application/json;q=0, */*, text/*",
                "text/*;q=0.9, */*;q=0.8", ",, text/html,,", "nonsense, text/html", "text/html;q=1.000",
                "application/json;q=7, text/html;q=0.1", "*/*;q=0.1, text/html;q=0.2, application/json;q=0.1",
                "application/json;version=2, text/html;q=0.1"})
        void is_answered_with_the_page_if_html_is_preferred(String accept) {
            assertTrue(Servers.one().get("/", "Accept", accept).expect(200).header("content-type")
                    .startsWith("text/html"), accept);
        }

        @ParameterizedTest @ValueSource(strings = {"*/*", "", "application/json", "application/json, */*",
                "application/json, text/html;q=0.1", "application/json, text/plain, */*", "text/html;q=0",
                "text/html;q=0.000, */*", "text/html;q=0.4, */*;q=0.5", "text/html;q=0, text/*",
                "application/*, text/*;q=0.9", "*/*;charset=utf-8", "text/plain;x=\"$1\\\\\"",
                "text/plain", "image/png", "application/xhtml+xml", "text/htmlx", "xtext/html", "text/html/x", "html",
                "text / html", "text/html;q=x", "text/html;q=", "text/html;q=-1", "text/html;q=1.1",
                "text/html;q=0.1234",
                "text/html;level=1", "text/html;charset=iso-8859-1", "text/plain;x=\"a, text/html, b\"",
                "*/*, text/*;q=0.5", "application/json;charset=utf-8, text/html;q=0.9", "application/json, text/*",
                "application/json;charset=utf-8, text/html"})
        void is_answered_with_json_if_html_is_not_preferred(String accept) throws Exception {
            Answer answer = Servers.one().raw(request("GET", "/", "Accept: " + accept)).expect(200);
            assertEquals("application/json", answer.header("content-type"), accept);
            assertEquals("Accept", answer.header("vary"));
        }

        @Test void may_have_several_Accept_headers() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                connection.send(request("GET", "/", "Accept: application/json;q=0.5", "Accept: text/html"));
                assertTrue(connection.read().expect(200).header("content-type").startsWith("text/html"));
                connection.send(request("GET", "/", "Accept: text/html;q=0.5", "Accept: application/json"));
                assertEquals("application/json", connection.read().expect(200).header("content-type"));
            }
        }

        @Test void with_thousands_of_media_types_is_answered_at_once() throws Exception {
            for (String range : List.of("text/html;q=0.1;", "*/*;q=1,", "\"", ",", ";", "text/html;x=\"\\\"\",")) {
                String accept = "Accept: " + range.repeat(16_000 / range.length());
                long began = System.nanoTime();
                for (int i = 0; i < 5; i++) Servers.one().raw(request("GET", "/", accept)).expect(200);
                assertTrue(System.nanoTime() - began < 2_000_000_000L, range);
            }
        }

        @Test void counts_once_for_browsers_and_programs() {
            long before = Servers.one().total();
            Servers.one().get("/").expect(200);
            Servers.one().get("/", "Accept", "text/html").expect(200);
            assertEquals(before + 2, Servers.one().total());
        }

        @Test void has_a_unique_and_increasing_number() throws Exception {
            JsonObject before = Servers.one().get("/api/visits").json();
            List<Callable<List<Long>>> visitors = new ArrayList<>();
            for (int i = 0; i < 12; i++) {
                Instance instance = Servers.three().get(i % 3);
                visitors.add(() -> {
                    List<Long> seen = new ArrayList<>();
                    for (int visit = 0; visit < 50; visit++) seen.add(instance.visits());
                    return seen;
                });
            }
            List<Long> all = new ArrayList<>();
            for (List<Long> seen : Wait.together(visitors)) {
                assertEquals(seen.stream().sorted().toList(), seen, "the numbers of one visitor");
                all.addAll(seen);
            }
            long first = before.get("total").getAsLong() + 1;
            assertEquals(Stream.iterate(first, n -> n + 1).limit(600).toList(), all.stream().sorted().toList());

            JsonObject after = Servers.one().get("/api/visits").json();
            long sum = 0;
            for (String name : after.getAsJsonObject("byInstance").keySet()) {
                long count = after.getAsJsonObject("byInstance").get(name).getAsLong();
                JsonElement was = before.getAsJsonObject("byInstance").get(name);
                if (name.startsWith("web")) assertEquals(200, count - (was == null ? 0 : was.getAsLong()), name);
                sum += count;
            }
            assertEquals(after.get("total").getAsLong(), sum, "byInstance adds up");
        }

        @Test void is_counted_for_no_other_request() {
            long before = Servers.one().total();
            for (String path : paths()) if (!path.equals("/") && !path.equals("/api/events")) Servers.one().get(path);
            Servers.one().get("/nowhere");
            Servers.one().send("PUT", "/", null).problem(405);
            Servers.one().send("OPTIONS", "/", null);
            Servers.one().send("HEAD", "/", null).expect(200);
            Answer page = Servers.one().send("HEAD", "/", null, "Accept", "text/html").expect(200);
            assertTrue(page.header("content-type").startsWith("text/html"), "the type that GET returns, in " + page);
            assertTrue(Integer.parseInt(page.header("content-length")) > 5_000, "as long as the page, in " + page);
            Servers.one().save("a", "b");
            assertEquals(before, Servers.three().get(2).total());
        }
    }

    @Nested class Health_and_metrics {
        @Test void have_a_liveness_probe() { Servers.one().get("/healthz").expect(200); }

        @Test void have_a_readiness_probe_that_names_each_store() {
            JsonObject json = Servers.one().get("/readyz").expect(200).json();
            assertEquals("ready", json.get("status").getAsString());
            assertEquals(JsonParser.parseString("{\"postgres\":\"up\",\"redis\":\"up\"}"), json.get("dependencies"));
        }

        @Test void are_in_the_format_of_prometheus() {
            Answer answer = Servers.one().get("/metrics").expect(200);
            assertTrue(answer.header("content-type").startsWith("text/plain"), answer.header("content-type"));
            String requests = "http_requests_total{method=\"GET\",route=\"/healthz\",status=\"200\"}";
            double before = Servers.one().metric(requests);
            Servers.one().get("/healthz");
            assertEquals(before + 1, Servers.one().metric(requests));
        }

        /** Another thread collects the metrics, but the connection's next request is the I/O thread's again. */
        @Test void leave_the_next_request_to_the_IO_thread() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                for (int i = 0; i < 20; i++) {
                    connection.send(request("GET", "/metrics") + request("GET", "/api/messages?limit=1"));
                    connection.read().expect(200);
                    connection.read().expect(200);
                }
            }
            assertTrue(LogCapture.all().stream().noneMatch(line -> line.contains("internal_error")));
        }

        @Test void are_not_returned_through_a_proxy() {
            Servers.one().get("/metrics", "X-Forwarded-For", "203.0.113.9").problem(404);
        }

        /** It lasts for hours, and would spoil the response times of all others. */
        @Test void have_no_duration_of_a_stream() {
            String streams = "http_requests_total{method=\"HEAD\",route=\"/api/events\",status=\"200\"}";
            double before = Servers.one().metric(streams);
            Servers.one().send("HEAD", "/api/events", null).expect(200);
            Wait.until("it is counted", () -> Servers.one().metric(streams) == before + 1);
            assertEquals(0, Servers.one().metric("http_request_duration_seconds_count{route=\"/api/events\"}"));
        }

        @Test void have_no_label_that_a_client_invented() throws Exception {
            Servers.one().raw(request("STRANGE", "/"));
            Servers.one().get("/strange-path");
            String metrics = Servers.one().get("/metrics").body();
            assertFalse(metrics.contains("STRANGE") || metrics.contains("strange-path"), metrics);
        }
    }

    @Nested class Invalid_JSON {
        @ParameterizedTest @ValueSource(strings = {"", " ", "{", "}", "{}}", "[", "[]", "null", "true", "1",
                "\"text\"", "nonsense", "{]",
                "{\"author\"}", "{\"author\":}", "{\"author\":\"a\"", "{\"author\":\"a\",}",
                        "{\"author\":\"a\",\"body\":\"b\",}", "{\"author\":\"a\",\"body\":\"b\"} x",
                        "{\"author\":\"a\",\"body\":\"b\"}{\"author\":\"a\",\"body\":\"b\"}",
                "{\"author\":\"a\" \"body\":\"b\"}", "{author:\"a\",body:\"b\"}", "{'author':'a','body':'b'}",
                        "{\"author\":\"a\",\"body\":b}",
                "{\"author\":\"a\",\"body\":\"b}", "{\"author\":\"a\",\"body\":\"\\x\"}",
                        "{\"author\":\"a\",\"body\":\"\\u12\"}",
                "{\"author\":\"a\",\"body\":\"\\uZZZZ\"}", "{\"author\":\"a\",\"body\":\"new\nline\"}",
                        "{\"author\":\"a\",\"body\":\"\t\"}",
                "{\"author\":\"a\",\"body\":\"b\",\"x\":NaN}", "{\"author\":\"a\",\"body\":\"b\",\"x\":01}",
                        "{\"author\":\"a\",\"body\":\"b\",\"x\":.5}",
                "{\"author\":\"a\",\"body\":\"b\",\"x\":True}", "{\"author\":\"a\";\"body\":\"b\"}",
                        "{\"author\"=\"a\",\"body\"=\"b\"}",
                "// no\n{\"author\":\"a\",\"body\":\"b\"}", "{/**/\"author\":\"a\",\"body\":\"b\"}",
                        ")]}'\n{\"author\":\"a\",\"body\":\"b\"}", "{\"author\":\"a\",\"author\":\"a\",\"body\":\"b\"}",
                        "{\"author\":\"a\",\"body\":\"b\",\"body\":\"c\"}",
                "author=a&body=b", "<message/>", "{\"author\":\"a\",\"body\":\"b\"}\u0000",
                        "\u0000{\"author\":\"a\",\"body\":\"b\"}"})
        void is_refused_with_400(String json) { Servers.one().post(json).problem(400); }

        @ParameterizedTest @ValueSource(strings = {"\\u0000", "a\\u0000b", "\\ud800", "\\udc00", "a\\ud83d",
                "\\ude42\\ud83d", "\\uD83D\\uD83D\\uDE42"}) void holds_a_nul_or_half_a_character(String text) {
            Servers.one().post("{\"author\":\"a\",\"body\":\"" + text + "\"}").problem(400);
            Servers.one().post("{\"author\":\"" + text + "\",\"body\":\"b\"}").problem(400);
        }

        @Test void holds_a_raw_nul() { Servers.one().post("{\"author\":\"a\",\"body\":\"b\u0000c\"}").problem(400); }

        static List<byte[]> notUtf8() {
            return List.of(new byte[] {(byte) 0xff}, new byte[] {(byte) 0xc0, (byte) 0x80},
                    new byte[] {(byte) 0xe2, (byte) 0x82}, new byte[] {(byte) 0xed, (byte) 0xa0, (byte) 0x80},
                            new byte[] {(byte) 0xf4, (byte) 0x90, (byte) 0x80, (byte) 0x80},
                    new byte[] {(byte) 0x80}, "naïve".getBytes(ISO_8859_1),
                            new byte[] {(byte) 0xf8, (byte) 0x88, (byte) 0x80, (byte) 0x80, (byte) 0x80});
        }

        @ParameterizedTest @MethodSource("notUtf8") void is_not_utf_8(byte[] bytes) throws Exception {
            ByteArrayOutputStream body = new ByteArrayOutputStream();
            body.write("{\"author\":\"a\",\"body\":\"".getBytes(UTF_8));
            body.write(bytes);
            body.write("\"}".getBytes(UTF_8));
            Servers.one().post(body.toByteArray()).problem(400);
        }

        @Test void is_utf_16() { Servers.one().post(Caller.message("a", "b")
                .getBytes(java.nio.charset.StandardCharsets.UTF_16)).problem(400); }

        @ParameterizedTest @ValueSource(strings = {"[", "{\"a\":", "{\"author\":",
                "{\"author\":\"a\",\"body\":\"b\",\"x\":["}) void is_very_deep(String layer) {
            boolean prefixed = layer.startsWith("{\"author\":\"a\"");
            String deep = prefixed ? layer + "[".repeat(8_000) + "]".repeat(8_001) + "}"
                    : layer.repeat(16_000 / layer.length());
            Servers.one().post(deep).problem(400);
        }

        @ParameterizedTest @ValueSource(strings = {"1", "true", "null", "[]", "{}", "[\"b\"]", "{\"text\":\"b\"}",
                "1e999999"}) void has_a_text_that_is_no_text(String value) {
            Answer answer = Servers.one().post("{\"author\":\"a\",\"body\":" + value + "}");
            answer.problem(answer.status() == 400 ? 400 : 422, "body");
        }

        @Test void is_explained() {
            for (String[] one : new String[][] {{"{\"author\":\"a\",\"body\":null}", "body is missing"},
                {"{\"author\":\"a\",\"body\":1}", "body has to be a string"},
                {"{\"author\":\"a\",\"author\":\"a\",\"body\":\"b\"}", "the JSON object has a field twice"},
                {"{", "the body is not valid JSON"}, {"[]", "the body has to be a JSON object"}})
                assertEquals(one[1], Servers.one().post(one[0]).text("detail"), one[0]);
        }

        @Test void does_not_disturb_the_next_request() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                connection.send(post("{nonsense".getBytes(UTF_8))).read().problem(400);
                connection.send(post(Caller.message("a", "after nonsense").getBytes(UTF_8))).read().expect(201);
            }
        }
    }

    @Nested class Valid_JSON {
        @ParameterizedTest @ValueSource(strings = {"{\"author\":\"a\",\"body\":\"b\",\"more\":1}",
                "{\"body\":\"b\",\"author\":\"a\"}",
                "\r\n\t {\"author\" : \"a\" ,\n\"body\":\"b\"}\n", "{\"\\u0061uthor\":\"\\u0061\",\"body\":\"b\"}",
                "{\"id\":7,\"instance\":\"x\",\"createdAt\":0,\"author\":\"a\",\"body\":\"b\","
                        + "\"deep\":[[[{\"x\":[null,true,-1.5e3]}]]]}"})
        void is_accepted_and_unknown_fields_are_ignored(String json) {
            Answer answer = Servers.one().post(json).expect(201);
            assertEquals(List.of("a", "b", "web1"), List.of(answer.text("author"), answer.text("body"),
                    answer.text("instance")));
        }

        @ParameterizedTest @ValueSource(strings = {"application/json", "application/json; charset=utf-8",
                "application/json;charset=UTF-8",
                "Application/JSON", "application/json; charset=\"utf-8\"", "application/json ; charset=utf-8"})
        void may_have_this_type(String type) {
            Servers.one().send("POST", "/api/messages", Caller.message("a", "b").getBytes(UTF_8), "Content-Type",
                    type).expect(201);
        }

        @ParameterizedTest @ValueSource(strings = {"text/plain", "application/xml", "application/json-patch+json",
                "json", "*/*", ";", "application/",
                "application/json; charset=iso-8859-1", "application/json; charset=utf-16",
                        "multipart/form-data; boundary=x",
                "application/octet-stream", "text/html, application/json"}) void may_not_have_this_type(String type) {
            Servers.one().send("POST", "/api/messages", Caller.message("a", "b").getBytes(UTF_8), "Content-Type",
                    type).problem(415);
        }

        @Test void may_not_be_compressed() {
            Servers.one().save("a", "b", "Content-Encoding", "gzip").problem(415);
        }

        @Test void has_to_have_a_type() {
            Servers.one().send("POST", "/api/messages", Caller.message("a", "b").getBytes(UTF_8)).problem(415);
        }
    }

    @Nested class A_body {
        @Test void of_32_KiB_is_accepted() { Servers.one().post(sized(MAX_BODY)).expect(201); }

        /** By its Content-Length alone: before a byte is sent, and without memory for it. */
        @ParameterizedTest @ValueSource(longs = {MAX_BODY + 1, 2_000_000_000L, 900_000_000_000_000_000L})
        void with_a_huge_length_is_rejected_at_once(long length) throws Exception {
            Answer answer = Servers.one().raw(request("POST", "/api/messages", "Content-Type: application/json",
                    "Content-Length: " + length)).problem(413);
            assertEquals("close", answer.header("connection"), "the body is not read");
        }

        /** As `json.dumps` of Python escapes it: 80 and 2,000 characters of two halves each. */
        @Test void of_the_longest_message_fits_however_it_is_escaped() {
            String half = "\\ud83d\\ude42";
            Servers.one().post("{\"author\":\"" + half.repeat(80) + "\",\"body\":\"" + half.repeat(2_000) + "\"}")
                    .expect(201);
            Servers.one().form("author=" + "%F0%9F%99%82".repeat(80) + "&body=" + "%F0%9F%99%82".repeat(2_000))
                    .expect(303);
        }

        @Test void of_one_byte_more_is_too_large() { Servers.one().post(sized(MAX_BODY + 1)).problem(413); }

        @ParameterizedTest @ValueSource(ints = {100_000, 1_000_000, 1_048_577, 10_000_000})
        void that_is_huge_gets_413(int size) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                connection.push(post(sized(size)).getBytes(ISO_8859_1)).read().problem(413);
            }
            Servers.one().get("/healthz").expect(200);
        }

        @ParameterizedTest @ValueSource(ints = {100_000, 10_000_000})
        void that_is_huge_and_of_no_type_gets_413_or_415(int size) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                String request = request("POST", "/api/messages", "Content-Type: text/plain", "Content-Length: "
                        + size);
                Answer answer = connection.push((request + "x".repeat(size)).getBytes(UTF_8)).read();
                answer.problem(answer.status() == 413 ? 413 : 415);
            }
        }

        @ParameterizedTest @ValueSource(ints = {1, 100, 5_000, 20_000})
        void may_come_in_chunks(int chunk) throws Exception {
            Servers.one().raw(chunked(sized(MAX_BODY), chunk)).expect(201);
        }

        @ParameterizedTest @ValueSource(ints = {MAX_BODY + 1, 1_000_000, 3_000_000})
        void in_chunks_may_not_be_larger_either(int size) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                Answer answer = connection.push(chunked(sized(size), 8_000).getBytes(ISO_8859_1)).read().problem(413);
                assertEquals("close", answer.header("connection"), "the rest of the body is not read");
            }
        }

        @ParameterizedTest @ValueSource(strings = {"xyz\r\n{}\r\n0\r\n\r\n", "-5\r\n{}\r\n0\r\n\r\n",
                "5\r\n{}0\r\n\r\n", "FFFFFFFFFFFFFFFFF\r\n{}\r\n", "2\r\n{}garbage\r\n0\r\n\r\n"})
        void in_invalid_chunks_is_rejected(String chunks) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                connection.send(request("POST", "/api/messages", "Content-Type: application/json",
                        "Transfer-Encoding: chunked") + chunks).end();
                assertEquals(4, connection.read().status() / 100);
            } catch (EOFException closed) { /* by Undertow's own reader of chunks */ }
            Servers.one().get("/healthz").expect(200);
        }

        @Test void that_ends_too_early_is_rejected() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                String head = request("POST", "/api/messages", "Content-Type: application/json", "Content-Length: 500");
                connection.send(head + "{\"author\":\"a\"").end().read().problem(400);
            }
        }

        @Test void whose_client_disconnects_leaves_nothing_behind() throws Exception {
            String metric = "http_requests_in_flight";
            for (int i = 0; i < 300; i++)
                try (RawConnection connection = Servers.one().connect()) {
                    connection.send(i % 3 == 0 ? request("GET", "/") : i % 3 == 1 ? post(sized(200)).substring(0, 200)
                            : post(sized(200)));
                    if (i % 2 == 0) connection.socket.setSoLinger(true, 0);
                }
            Wait.until("all are over but this one", () -> Servers.one().metric(metric) <= 1);
            Servers.one().save("a", "still here").expect(201);
        }

        @Test void gets_100_if_the_client_waits_for_it() throws Exception {
            byte[] body = sized(1_000);
            try (RawConnection connection = Servers.one().connect()) {
                connection.send(request("POST", "/api/messages", "Content-Type: application/json",
                        "Content-Length: 1000", "Expect: 100-continue"));
                connection.read().expect(100);
                connection.send(body).read().expect(201);
            }
        }

        @Test void that_is_too_large_gets_no_100() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                connection.send(request("POST", "/api/messages", "Content-Type: application/json",
                        "Content-Length: 1000000", "Expect: 100-continue")).read().problem(413);
            }
        }

        @Test void of_a_GET_is_not_taken_for_the_next_request() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                String inner = request("GET", "/nowhere");
                String outer = request("GET", "/healthz", "Content-Length: " + inner.length());
                connection.send(outer + inner).read().expect(200);
                connection.send(request("GET", "/healthz")).read().expect(200);
            }
        }
    }

    @Nested class A_request {
        @ParameterizedTest @ValueSource(strings = {"//", "///", "/?", "/?x", "/?=&&=", "/?a=1&a=2", "/?%00=%00",
                "/?limit=%F0%9F%99%82", "/api/messages?limit=1;before=2",
                "/healthz;x=y", "/healthz/", "/api/messages?", "/api/messages?x=%ff", "/%zz", "/%", "/%f",
                        "/healthz?%", "/\"<>", "/a|b", "/a\\b", "/#x", "/é"})
        void with_an_odd_path_is_answered_without_a_500(String path) throws Exception {
            Answer answer = Servers.one().raw(request("GET", path, "Connection: close"));
            assertTrue(Set.of(200, 400, 404).contains(answer.status()), "" + answer);
        }

        @ParameterizedTest @ValueSource(ints = {2_000, 10_000, 30_000, 100_000})
        void with_a_very_long_path_is_answered(int length) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                Answer answer = connection.push(request("GET", "/" + "a".repeat(length)).getBytes(UTF_8)).read();
                assertTrue(Set.of(400, 404, 414, 431).contains(answer.status()), "" + answer);
            }
        }

        @Test void with_many_parameters_is_answered() throws Exception {
            Servers.one().raw(request("GET", "/api/messages?limit=1" + "&x=1".repeat(2_000))).expect(200);
            String many = IntStream.range(0, 2_000).mapToObj(n -> "&x" + n).collect(Collectors.joining());
            Servers.one().raw(request("GET", "/api/messages;a;b?limit=7&limit=1" + many)).problem(404);
            assertEquals(1, Servers.one().raw(request("GET", "/api/messages?limit=7&limit=1" + many)).expect(200).json()
                    .getAsJsonArray("messages").size(), "the last of a name counts");
        }

        @Test void with_a_very_long_path_takes_little_of_the_log_and_of_the_answer() throws Exception {
            Answer answer = Servers.one().raw(request("GET", "/api/messages/" + "%01".repeat(2_500))).problem(404);
            assertTrue(answer.body().length() < 500, answer.body());
            Wait.until("it is in the log", () -> LogCapture.all().stream()
                    .anyMatch(line -> line.contains("\"path\":\"/api/messages/\\u0001")));
            assertTrue(LogCapture.all().stream().allMatch(line -> line.length() < 2_000), "short lines");
        }

        /** A terminal obeys U+009B as it obeys U+001B [. */
        @Test void with_control_characters_leaves_none_in_the_log() throws Exception {
            Servers.one().raw(request("GET", "/in-the-log/%1b[31m%7f%c2%80%c2%9b31m%c2%9f")).problem(404);
            Wait.until("it is in the log", () -> LogCapture.all().stream().anyMatch(line ->
                    line.contains("/in-the-log/\\u001b[31m\\u007f\\u0080\\u009b31m\\u009f")));
            assertTrue(LogCapture.all().stream().noneMatch(line -> line.chars().anyMatch(Character::isISOControl)));
        }

        @Test void with_300_headers_is_answered() throws Exception {
            String[] headers = Stream.iterate(1, n -> n + 1).limit(300).map(n -> "X-" + n + ": " + n)
                    .toArray(String[]::new);
            Answer answer = Servers.one().raw(request("GET", "/healthz", headers));
            assertTrue(Set.of(200, 400, 431).contains(answer.status()), "" + answer);
        }

        @ParameterizedTest @ValueSource(ints = {8_000, 64 * 1024, 1_000_000})
        void with_a_very_long_header_is_answered(int length) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                String request = request("GET", "/healthz", "X-Long: " + "a".repeat(length));
                Answer answer = connection.push(request.getBytes(UTF_8)).read();
                assertTrue((length < 10_000 ? Set.of(200) : Set.of(400, 431)).contains(answer.status()), "" + answer);
            }
        }

        @Test void without_a_host_is_rejected() throws Exception {
            assertEquals(400, Servers.one().raw("GET /healthz HTTP/1.1\r\n\r\n").status());
        }

        @ParameterizedTest @ValueSource(strings = {"nonsense\r\n\r\n", "GET\r\n\r\n", "GET /\r\n\r\n",
                "GET / FTP/1.1\r\nHost: x\r\n\r\n",
                "GET  /healthz  HTTP/1.1\r\nHost: x\r\n\r\n", "GET /healthz HTTP/1.1\r\nHost x\r\n\r\n",
                        "GET /healthz HTTP/1.1\r\nHost: x\r\n: empty\r\n\r\n",
                "GET /healthz HTTP/1.1\r\nHost: x\r\nBad Name: y\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"})
        void that_is_no_http_is_rejected(String text) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                int status = connection.send(text).end().read().status();
                assertTrue(status >= 400 && status < 500 || status == 505 || status == 501, "status " + status);
            }
        }

        @ParameterizedTest @ValueSource(strings = {"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
                "CONNECT localhost:80 HTTP/1.1\r\nHost: x\r\n\r\n",
                "TRACE / HTTP/1.1\r\nHost: x\r\nCookie: secret\r\n\r\n", "get / HTTP/1.1\r\nHost: x\r\n\r\n"})
        void with_an_odd_method_gets_no_500_and_no_echo(String text) throws Exception {
            Answer answer = Servers.one().raw(text);
            assertTrue(answer.status() == 200 && text.startsWith("OPTIONS") || answer.status() == 204
                    || answer.status() / 100 == 4, "" + answer);
            assertFalse(answer.body().contains("secret"), "" + answer);
        }

        @Test void with_a_whole_url_is_answered() throws Exception {
            Servers.one().raw("GET http://example.org/healthz HTTP/1.1\r\nHost: example.org\r\n\r\n").expect(200);
        }

        @Test void of_http_1_0_is_answered_and_the_connection_closed() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                connection.send("GET /healthz HTTP/1.0\r\n\r\n").read().expect(200);
                assertTrue(connection.isClosed());
            }
        }

        @Test void with_Connection_close_is_the_last_one() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                assertEquals("close", connection.send(request("GET", "/", "Connection: close")).read().expect(200)
                        .header("connection"));
                assertTrue(connection.isClosed());
            }
        }

        @Test void after_request_is_answered_in_turn_on_one_connection() throws Exception {
            byte[] body = sized(500);
            try (RawConnection connection = Servers.one().connect()) {
                connection.send(request("GET", "/healthz") + post(body) + request("GET", "/nowhere")
                        + post("{".getBytes(UTF_8)) + request("GET", "/") + post(body) + request("GET", "/healthz"));
                List<Integer> status = new ArrayList<>();
                for (int i = 0; i < 7; i++) status.add(connection.read().status());
                assertEquals(List.of(200, 201, 404, 400, 200, 201, 200), status);
            }
        }

        @Test void that_comes_byte_by_byte_is_answered() throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                connection.socket.setTcpNoDelay(true);
                for (byte one : post(sized(100)).getBytes(UTF_8)) connection.send(new byte[] {one});
                connection.read().expect(201);
            }
        }
    }

    /** Request smuggling: a proxy that parses a length in another way would let a second request through. */
    @Nested class A_request_within_a_request {
        private static final String INNER = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";

        static List<String> heads() {
            return List.of("Content-Length: 4\r\nContent-Length: 40", "Content-Length: 4, 40", "Content-Length: -1",
                    "Content-Length: abc",
                    "Content-Length: 99999999999999999999", "Content-Length: +4", "Content-Length: 0x4",
                            "Transfer-Encoding: xchunked", "Transfer-Encoding: gzip",
                    "Transfer-Encoding: chunked, identity", "Transfer-Encoding : chunked",
                            "Content-Length: 4\r\n Transfer-Encoding: chunked");
        }

        @ParameterizedTest @MethodSource("heads")
        void is_rejected_if_its_length_is_ambiguous(String head) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                Answer answer = connection.send("POST /api/messages HTTP/1.1\r\nHost: x\r\nContent-Type: "
                        + "application/json\r\n" + head + "\r\n\r\n0\r\n\r\n" + INNER).end().read();
                assertTrue(answer.status() / 100 == 4 || answer.status() == 501, "" + answer);
            }
        }

        @ParameterizedTest @ValueSource(strings = {"Content-Length: 5\r\nTransfer-Encoding: chunked",
                "Transfer-Encoding: chunked\r\nContent-Length: 5",
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
                        "Transfer-Encoding: identity\r\nContent-Length: 5"})
        void is_rejected_and_ends_the_connection_if_two_lengths_are_given(String head) throws Exception {
            try (RawConnection connection = Servers.one().connect()) {
                Answer answer = connection.send("POST /api/messages HTTP/1.1\r\nHost: x\r\nContent-Type: "
                        + "application/json\r\n" + head + "\r\n\r\n0\r\n\r\n" + INNER).read();
                assertTrue(answer.status() / 100 == 4 || answer.status() == 501, "" + answer);
                assertTrue(connection.isClosed(), "expected that the connection ends, actual: it went on");
            }
        }
    }
}
