///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
// JSON Schema 2020-12, which OpenAPI 3.1 uses.
//DEPS com.networknt:json-schema-validator:3.0.9
//SOURCES ServiceTest.java

import com.google.gson.*;
import com.networknt.schema.*;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.extension.ExtendWith;

import java.util.*;
import java.util.function.BiConsumer;
import java.util.stream.Collectors;

import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.*;

/**
 * GET /openapi.json describes the service: its routes, and every response.
 *
 * <pre>
 *   ./jbang tests/service/OpenApiTest.java
 * </pre>
 */
@ExtendWith(LogCapture.class)
@TestMethodOrder(MethodOrderer.OrderAnnotation.class)
class OpenApiTest {
    public static void main(String[] arguments) { ServiceTest.run(List.of(OpenApiTest.class)); }

    /** Only too many requests at once get these. */
    private static final Set<String> NOT_PROVOKED = Set.of("get / 503", "get /api/events 503");
    private static final SchemaRegistry SCHEMAS = SchemaRegistry.withDefaultDialect(SpecificationVersion.DRAFT_2020_12);
    private static final Map<String, Schema> SCHEMA_AT = new HashMap<>();
    private static final Set<String> SEEN = new TreeSet<>();

    private static JsonObject document;

    @BeforeAll static void is_served() { document = Servers.one().get("/openapi.json").expect(200).json(); }

    // --- The document itself

    @Test @Order(1) void describes_exactly_the_routes_of_the_table() {
        Set<String> described = new TreeSet<>();
        eachOperation((name, operation) -> described.add(name));
        assertEquals(Servers.one().service.routes().stream()
                .map(route -> route.method().toLowerCase() + " " + route.path())
                .collect(Collectors.toCollection(TreeSet::new)), described);
    }

    @Test @Order(1) void has_no_broken_reference() {
        each(document, "#", (pointer, object) -> {
            if (object.has("$ref")) assertNotNull(at(object.get("$ref").getAsString()), pointer);
        });
    }

    @Test @Order(1) void has_no_component_that_nothing_refers_to() {
        Set<String> defined = new TreeSet<>(), used = new TreeSet<>(Set.of(
                "#/components/responses/MethodNotAllowed")); // of no operation: the response to all others
        document.getAsJsonObject("components").entrySet().forEach(kind -> kind.getValue().getAsJsonObject().keySet()
                .forEach(name -> defined.add("#/components/" + kind.getKey() + "/" + name)));
        each(document, "#", (pointer, object) -> {
            if (object.has("$ref")) used.add(object.get("$ref").getAsString());
        });
        assertEquals(defined, used);
    }

    @Test @Order(1) void gives_examples_that_fit_their_schemas() {
        each(document, "#", (pointer, object) -> {
            if (!object.has("schema")) return;
            if (object.has("example")) fits(pointer + "/schema", object.get("example"), pointer + "/example");
            if (object.has("examples"))
                object.getAsJsonObject("examples").entrySet().forEach(example -> fits(pointer + "/schema",
                        example.getValue().getAsJsonObject().get("value"), pointer + "/examples/" + example.getKey()));
        });
    }

    // --- While both stores are available

    @Test @Order(2) void is_right_about_visits() {
        Caller one = Servers.one();
        described("get", "/", one.get("/"));
        described("get", "/", one.get("/", "Accept", "text/html"));
        described("get", "/", one.get("/?limit=0", "Accept", "text/html"));
        described("get", "/api/visits", one.get("/api/visits"));
        described("get", "/api/instances", one.get("/api/instances"));
    }

    @Test @Order(2) void is_right_about_storing_a_message() {
        Caller one = Servers.one();
        String[] key = {"Idempotency-Key", "openapi-" + System.nanoTime()};
        assertEquals(201, described("post", "/api/messages", one.save("Ada", "once 👋", key)).status());
        assertEquals(200, described("post", "/api/messages", one.save("Ada", "once 👋", key)).status());
        assertEquals(422, described("post", "/api/messages", one.save("Ada", "another", key)).status());
        described("post", "/api/messages", one.form("author=Ada&body=from+a+form"));
        described("post", "/api/messages", one.save("", "x".repeat(2_001)));
        described("post", "/api/messages", one.form("author=&body=x", "Accept", "text/html"));
        described("post", "/api/messages", one.post("{"));
        described("post", "/api/messages", one.post("\"" + "x".repeat(33 * 1024) + "\""));
        described("post", "/api/messages", one.send("POST", "/api/messages", "{}".getBytes(UTF_8),
                "Content-Type", "text/plain"));
    }

    @Test @Order(2) void is_right_about_reading_messages() {
        Caller one = Servers.one();
        String location = one.save("Ada", "to be read").expect(201).header("location");
        one.save("Ada", "to be on the page before").expect(201);
        assertTrue(described("get", "/api/messages", one.get("/api/messages?limit=1")).json().get("next")
                .isJsonPrimitive());
        assertTrue(described("get", "/api/messages", one.get("/api/messages?before=1")).json().get("next")
                .isJsonNull());
        described("get", "/api/messages", one.get("/api/messages?limit=101"));
        described("get", "/api/messages/{id}", one.get(location));
        described("get", "/api/messages/{id}", one.get("/api/messages/999999999999999999"));
    }

    @Test @Order(2) void is_right_about_operation() {
        Caller one = Servers.one();
        for (String path : List.of("/healthz", "/readyz", "/metrics", "/openapi.json")) described("get", path,
                one.get(path));
        described("get", "/metrics", one.get("/metrics", "X-Forwarded-For", "192.0.2.1"));
    }

    @Test @Order(2) void is_right_about_events() throws Exception {
        try (EventsTest.Subscriber subscriber = new EventsTest.Subscriber(Servers.one(), "")) {
            Answer message = Servers.one().save("Ada", "to all").expect(201);
            Servers.one().get("/").expect(200);
            subscriber.awaits(message);
            Wait.until("a visit", () -> !subscriber.all("visit").isEmpty());
            described("get", "/api/events", new Answer(subscriber.response.statusCode(),
                    Answer.anyCase(subscriber.response.headers().map()), "\"\""));
            for (var event : subscriber.all("message"))
                fits("#/components/schemas/Message", JsonParser.parseString(event.data()), "an event");
            for (var event : subscriber.all("visit"))
                fits("#/components/schemas/Visits", JsonParser.parseString(event.data()), "an event");
        }
    }

    @Test @Order(2) void is_right_about_events_after_no_cursor() {
        described("get", "/api/events", Servers.one().get("/api/events?after=7").expect(400));
    }

    @Test @Order(2) void is_right_about_unknown_paths_and_methods() {
        Caller one = Servers.one();
        describedAs("#/components/responses/Problem", one.get("/nowhere").expect(404), "a path that is not there");
        for (String path : document.getAsJsonObject("paths").keySet())
            describedAs("#/components/responses/MethodNotAllowed",
                    one.send("DELETE", path.replace("{id}", "1"), null).expect(405), "DELETE " + path);
    }

    @Test @Order(2) void accepts_the_same_messages_as_the_service() {
        for (String author : List.of("a", "", "x".repeat(80), "x".repeat(81), "👋".repeat(80), "👋".repeat(81)))
            for (String body : List.of("b", "", "x".repeat(2_000), "x".repeat(2_001), "字".repeat(2_000))) {
                String draft = Caller.message(author, body);
                boolean fits = schema("#/components/schemas/Draft").validate(draft, InputFormat.JSON).isEmpty();
                assertEquals(fits ? 201 : 422, Servers.one().post(draft).status(), () -> draft.substring(0, 60));
            }
    }

    // --- While a store is unavailable

    @Test @Order(3) void is_right_about_an_outage_of_PostgreSQL() {
        try (Instance one = new Instance("no-postgres", Servers.database(), "DB_PORT", "" + Servers.freePort())) {
            described("get", "/api/messages", one.get("/api/messages").expect(503));
            described("get", "/api/messages/{id}", one.get("/api/messages/1").expect(503));
            described("post", "/api/messages", one.save("Ada", "lost").expect(503));
            described("post", "/api/messages", one.form("author=Ada&body=kept", "Accept", "text/html").expect(503));
            described("get", "/readyz", one.get("/readyz").expect(503));
            described("get", "/", one.get("/", "Accept", "text/html").expect(200));
        }
    }

    @Test @Order(3) void is_right_about_an_outage_of_Redis() {
        try (Instance one = new Instance("no-redis", Servers.database(), "REDIS_PORT", "" + Servers.freePort())) {
            assertTrue(described("get", "/", one.get("/")).json().get("visits").isJsonNull());
            described("get", "/api/visits", one.get("/api/visits").expect(503));
            one.awaitDegraded();
            described("get", "/readyz", one.get("/readyz").expect(200));
        }
    }

    @Test @Order(4) void describes_no_response_that_never_comes() {
        Set<String> described = new TreeSet<>();
        eachOperation((name, operation) -> operation.getAsJsonObject("responses").keySet()
                .forEach(status -> described.add(name + " " + status)));
        described.removeAll(NOT_PROVOKED);
        described.removeIf(name -> name.endsWith(" 429")); // nginx limits by client address, not an instance
        assertEquals(described, SEEN);
    }

    // --- Comparing a response with the document

    /** Checks the status, type, headers and body of a response, and remembers it. */
    private static Answer described(String method, String path, Answer answer) {
        String name = method + " " + path + " " + answer.status();
        String response = "#/paths/" + path.replace("/", "~1") + "/" + method + "/responses/" + answer.status();
        assertNotNull(at(response), () -> "expected an answer that is described, actual: " + name + " " + answer);
        describedAs(response, answer, name);
        SEEN.add(name);
        return answer;
    }

    private static void describedAs(String response, Answer answer, String name) {
        while (at(response).has("$ref")) response = at(response).get("$ref").getAsString();
        String described = response;
        if (at(described).has("headers")) at(described).getAsJsonObject("headers").keySet()
                .forEach(header -> headerFits(described + "/headers/" + header, header, answer, name));
        if (!at(described).has("content")) {
            assertEquals("", answer.body(), name);
            return;
        }
        String type = answer.header("content-type").split(";")[0];
        String content = described + "/content/" + type.replace("/", "~1");
        assertNotNull(at(content), () -> name + " has a type that is not described: " + type);
        fits(content + "/schema", type.endsWith("json") ? JsonParser.parseString(answer.body())
                : new JsonPrimitive(answer.body()), name);
    }

    private static void headerFits(String pointer, String header, Answer answer, String name) {
        while (at(pointer).has("$ref")) pointer = at(pointer).get("$ref").getAsString();
        assertNotNull(answer.header(header), header + " of " + name);
        fits(pointer + "/schema", new JsonPrimitive(answer.header(header)), header + " of " + name);
    }

    private static void fits(String pointer, JsonElement value, String name) {
        var errors = schema(pointer).validate(value.toString(), InputFormat.JSON,
                context -> context.executionConfig(config -> config.formatAssertionsEnabled(true)));
        assertTrue(errors.isEmpty(), () -> name + " does not fit " + pointer + ": " + errors + "\n" + value);
    }

    /** The document with a reference at its root, so that the schema finds what it refers to. */
    private static Schema schema(String pointer) {
        return SCHEMA_AT.computeIfAbsent(pointer, p -> {
            JsonObject root = document.deepCopy();
            root.addProperty("$ref", p.replace("{", "%7B").replace("}", "%7D"));
            return SCHEMAS.getSchema(root.toString(), InputFormat.JSON);
        });
    }

    /** The target of a pointer of the form #/a/b, or null. */
    private static JsonObject at(String pointer) {
        JsonElement found = document;
        for (String step : pointer.substring(2).split("/"))
            found = found == null || !found.isJsonObject() ? null
                    : found.getAsJsonObject().get(step.replace("~1", "/").replace("~0", "~"));
        return found == null || !found.isJsonObject() ? null : found.getAsJsonObject();
    }

    private static void eachOperation(BiConsumer<String, JsonObject> action) {
        document.getAsJsonObject("paths").entrySet().forEach(path -> path.getValue().getAsJsonObject().entrySet()
                .forEach(method -> action.accept(method.getKey() + " " + path.getKey(), method.getValue()
                        .getAsJsonObject())));
    }

    private static void each(JsonElement element, String pointer, BiConsumer<String, JsonObject> action) {
        if (element instanceof JsonArray array)
            for (int i = 0; i < array.size(); i++) each(array.get(i), pointer + "/" + i, action);
        if (!(element instanceof JsonObject object)) return;
        action.accept(pointer, object);
        object.entrySet().forEach(one -> each(one.getValue(), pointer + "/" + one.getKey().replace("/", "~1"), action));
    }
}
