import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Nested;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.UUID;
import java.util.stream.Stream;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

/** `jbang Service.java` on its own, as a program: the servers it brings along, its data, its signals, and its log. */
@ExtendWith(Evidence.class)
class EmbeddedTest {
    private static final Path DATA = Servers.FOLDER.resolve("kept");
    private static Program program;

    @BeforeAll static void start() throws Exception {
        program = Program.jbang(Map.of("DATA_DIR", DATA.toString()));
        Wait.until("jbang Service.java is ready", Duration.ofSeconds(50), () -> program.get("/readyz").expect(200)
                .text("status").equals("ready"));
    }

    @AfterAll static void stop() throws IOException { program.close(); }

    /** Each test can begin with a program that runs, whatever the one before did to it. */
    static Program running() throws IOException {
        if (!program.process.isAlive()) program = Program.java(Map.of("DATA_DIR", DATA.toString()));
        Wait.until("ready, or ended", Duration.ofSeconds(30), () -> !program.process.isAlive()
                || program.get("/readyz").status() == 200);
        assertTrue(program.process.isAlive(), "expected that it runs, actual: it ended, and said " + program.err());
        program.awaitReady();
        return program;
    }

    /** PostgreSQL and Redis, as their own files name them. */
    static List<ProcessHandle> servers(Path data) throws IOException {
        List<ProcessHandle> found = new ArrayList<>();
        for (Path file : List.of(data.resolve("postgres/postmaster.pid"), data.resolve("redis/redis.pid")))
            if (Files.exists(file)) Files.readAllLines(file).stream().limit(1).filter(line -> line.matches("\\d+"))
                    .flatMap(pid -> ProcessHandle.of(Long.parseLong(pid)).stream()).forEach(found::add);
        return found;
    }

    static void signal(String signal, Stream<ProcessHandle> processes) throws Exception {
        for (ProcessHandle process : processes.toList()) new ProcessBuilder("kill", "-" + signal, "" + process.pid())
                .start().waitFor();
    }

    @Nested class Its_data {
        @Test void lie_in_a_folder_that_it_names() throws Exception {
            String folder = DATA.toString();
            running();
            Wait.until("it names " + folder, () -> program.out().stream().anyMatch(line -> line.contains(folder)));
        }

        @Test void are_still_there_when_it_was_stopped_and_started_again() throws Exception {
            String key = UUID.randomUUID().toString();
            Answer kept = running().say("keeper", "kept \uD83D\uDE42", "Idempotency-Key", key).expect(201);
            long visits = program.visits();
            List<ProcessHandle> servers = servers(DATA);
            assertEquals(2, servers.size());
            program.close(); // SIGTERM
            assertNotEquals(137, program.exitCode(), "it ended by itself");
            Wait.until("no process is left of " + servers, () -> servers.stream().noneMatch(ProcessHandle::isAlive));
                    // or a zombie, for a moment
            assertEquals(kept.json(), running().get(kept.header("location")).expect(200).json());
            assertEquals(visits + 1, program.visits());
            assertEquals(kept.json(), program.say("keeper", "kept \uD83D\uDE42", "Idempotency-Key", key).expect(200)
                    .json());
        }

        @Test void are_still_there_when_it_was_killed() throws Exception {
            Answer kept = running().say("keeper", "kept through kill -9").expect(201);
            long visits = program.visits();
            List<ProcessHandle> servers = servers(DATA);
            program.process.destroyForcibly().waitFor();
            assertTrue(servers.stream().allMatch(ProcessHandle::isAlive), "its servers were left behind");
            assertEquals(kept.json(), running().get(kept.header("location")).expect(200).json());
            assertEquals(visits + 1, program.visits());
            assertTrue(servers.stream().noneMatch(ProcessHandle::isAlive), "those left behind are stopped");
        }

        @Test void take_no_folder_of_somebody_else() throws Exception {
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("somebody")),
                    theirs = folder.resolve("postgres/precious");
            Files.createDirectories(theirs.getParent());
            Files.writeString(theirs, "mine");
            String said = ConfigurationTest.A_process.end(Map.of("DATA_DIR", folder.toString()));
            ConfigurationTest.assertSays(said, "DATA_DIR", folder.toString(), "empty", "postgres");
            assertEquals("mine", Files.readString(theirs));
            try (Stream<Path> files = Files.list(folder)) { assertEquals(List.of(theirs.getParent()), files.toList()); }
        }

        @Test void that_were_never_complete_are_made_anew() throws Exception {
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("half")),
                    half = folder.resolve("postgres/base");
            Files.createDirectories(half);
            for (String mark : List.of("threefold-data", "postgres-unfinished")) Files.createFile(folder.resolve(mark));
            try (Program begun = Program.java(Map.of("DATA_DIR", folder.toString()))) {
                begun.awaitReady();
                assertFalse(Files.exists(folder.resolve("postgres-unfinished")));
            }
            cutPrograms(folder); // killed while they were unpacked
            Files.createFile(folder.resolve("postgres-beginning"));
            try (Program begun = Program.java(Map.of("DATA_DIR", folder.toString()))) {
                begun.awaitReady();
                assertFalse(Files.exists(folder.resolve("postgres-beginning")));
            }
        }

        private static void cutPrograms(Path folder) throws Exception {
            try (Stream<Path> files = Files.walk(folder.resolve("postgres-programs"))) {
                for (Path file : files.filter(file -> file.endsWith("bin/postgres")).toList())
                    Files.write(file, new byte[1_000]);
            }
        }

        @Test void are_opened_to_nobody_without_the_password() throws Exception {
            running();
            int port = Integer.parseInt(Files.readAllLines(DATA.resolve("postgres/postmaster.pid")).get(3).strip());
            java.sql.SQLException refused = org.junit.jupiter.api.Assertions.assertThrows(java.sql.SQLException.class,
                    () -> java.sql.DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + port + "/postgres",
                            "postgres", "guess"));
            assertTrue(refused.getSQLState().startsWith("28"), "" + refused);
            assertEquals("rw-------", java.nio.file.attribute.PosixFilePermissions.toString(
                    Files.getPosixFilePermissions(DATA.resolve("password"))));
        }

        /** A pid that was written down may belong to somebody else by now, even to one with a name like ours. */
        @Test void cost_no_stranger_its_life() throws Exception {
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("strangers"));
            Path stranger = Files.copy(Path.of("/bin/sleep"), Servers.FOLDER.resolve("redis-server-of-a-stranger"),
                    java.nio.file.StandardCopyOption.COPY_ATTRIBUTES);
            Process process = new ProcessBuilder(stranger.toString(), "60").start();
            try {
                Files.createFile(folder.resolve("threefold-data"));
                Files.createDirectories(folder.resolve("redis"));
                Files.writeString(folder.resolve("redis/redis.pid"), process.pid() + "\n");
                try (Program begun = Program.java(Map.of("DATA_DIR", folder.toString()))) {
                    begun.awaitReady();
                    assertTrue(process.isAlive(), "expected that it lets a stranger live");
                }
            } finally { process.destroy(); }
        }

        /** PostgreSQL itself would not start while any process has the number in its file. */
        @Test void are_used_although_a_stranger_has_the_number_of_their_server() throws Exception {
            Path folder = Servers.FOLDER.resolve("reused");
            try (Program first = Program.java(Map.of("DATA_DIR", folder.toString()))) {
                first.awaitReady();
                first.say("a", "before").expect(201);
            }
            Process stranger = new ProcessBuilder("sleep", "60").start();
            try {
                Files.writeString(folder.resolve("postgres/postmaster.pid"), stranger.pid() + "\n" + folder
                        .resolve("postgres") + "\n1\n1\n\nlocalhost\n  1 1\nready\n");
                try (Program again = Program.java(Map.of("DATA_DIR", folder.toString()))) {
                    again.awaitReady();
                    assertTrue(again.get("/api/messages").body().contains("before"));
                    assertTrue(stranger.isAlive());
                }
            } finally { stranger.destroy(); }
        }

        @Test void are_not_shared_with_a_second_one() throws Exception {
            long visits = running().visits();
            try (Program second = Program.java(Map.of("DATA_DIR", DATA.toString()))) {
                assertEquals(2, second.exitCode(), "" + second.err());
                assertEquals(1, second.err().size(), "" + second.err());
                ConfigurationTest.assertSays(second.err().getFirst(), "DATA_DIR", DATA.toString());
            }
            assertEquals(visits + 1, program.visits());
            program.say("first", "not disturbed").expect(201);
        }
    }

    @Nested class Its_end {
        @Test void while_it_still_starts_leaves_no_process_behind() throws Exception {
            Path data = Servers.FOLDER.resolve("interrupted");
            try (Program starting = Program.java(Map.of("DATA_DIR", data.toString()))) {
                Wait.until("Redis has started", Duration.ofSeconds(30), () -> !servers(data).isEmpty());
                List<ProcessHandle> servers = new ArrayList<>(servers(data));
                starting.process.destroy();
                starting.exitCode();
                servers.addAll(servers(data));
                try {
                    Wait.until("no process is left of " + servers, Duration.ofSeconds(5), () -> servers.stream()
                            .noneMatch(ProcessHandle::isAlive));
                } finally { signal("KILL", servers.stream().filter(ProcessHandle::isAlive)); }
            }
        }
    }

    /** As when a machine swaps or a debugger holds it: the servers are there and do not answer. */
    @Nested class When_stopped_by_a_signal {
        @Test void redis_costs_the_count_alone_and_is_missed_no_longer_than_it_is_away() throws Exception {
            long visits = running().visits();
            ProcessHandle redis = servers(DATA).getLast();
            signal("STOP", Stream.of(redis));
            try {
                assertTrue(OutageTest.inTime(() -> program.get("/")).expect(200).json().get("visits").isJsonNull());
                OutageTest.inTime(() -> program.say("a", "without Redis")).expect(201);
                OutageTest.inTime(() -> program.get("/api/visits")).unavailable();
            } finally { signal("CONT", Stream.of(redis)); }
            Wait.until("it counts again", Wait.PROMISED, () -> program.visits() > visits);
        }

        @Test void postgres_is_answered_for_in_time_and_missed_no_longer_than_it_is_away() throws Exception {
            Answer kept = running().say("a", "before the stop").expect(201);
            ProcessHandle postgres = servers(DATA).getFirst();
            List<ProcessHandle> all = Stream.concat(Stream.of(postgres), postgres.descendants()).toList();
            signal("STOP", all.stream());
            try {
                OutageTest.inTime(() -> program.say("a", "nobody hears")).unavailable();
                OutageTest.inTime(() -> program.get(kept.header("location"))).unavailable();
                Wait.until("it is noticed", Wait.PROMISED, () -> program.get("/readyz").text("status").equals("degraded"));
                assertTrue(program.visits() > 0);
            } finally { signal("CONT", all.stream()); }
            Wait.until("messages are there again", Wait.PROMISED, () -> program.get(kept.header("location"))
                    .status() == 200);
            Wait.until("they are stored again", Wait.PROMISED, () -> program.say("a", "heard").status() == 201);
        }
    }

    @Nested class Its_log {
        private List<JsonObject> lines(String word) {
            return program.out().stream().filter(line -> line.contains(word))
                    .map(line -> JsonParser.parseString(line).getAsJsonObject()).toList();
        }

        private JsonObject only(String id) {
            Wait.until("a line of " + id, () -> !lines(id).isEmpty());
            assertEquals(1, lines(id).size(), "" + lines(id));
            return lines(id).getFirst();
        }

        @Test void has_one_line_for_a_refusal_that_says_why() throws Exception {
            String id = UUID.randomUUID().toString();
            running().say("a", "x".repeat(2_001), "X-Request-Id", id).problem(422);
            JsonObject line = only(id);
            assertTrue(line.keySet().containsAll(Set.of("time", "level", "instance", "event", "request", "method",
                    "path", "status", "reason")), "" + line);
            assertEquals(List.of("program", "POST", "/api/messages", "422"),
                    List.of(line.get("instance").getAsString(), line.get("method").getAsString(),
                    line.get("path").getAsString(), line.get("status").getAsString()));
            assertTrue(line.get("reason").getAsString().contains("2001"), "" + line);
        }

        @Test void takes_no_line_from_a_stranger() throws Exception {
            String id = UUID.randomUUID().toString(), forged = "{\"event\":\"forged-" + id + "\"}";
            String[] ways = {"/x%0a%7b%22event%22:%22forged-" + id + "%22%7d%0a", "/%0d%0aforged-" + id,
                    "/%E2%80%A8forged-" + id, "/%1b%5b2Jforged-" + id};
            for (String path : ways) running().raw(HttpTest.request("GET", path)).problem(404);
            program.raw(HttpTest.request("GET", "/nowhere", "X-Request-Id: a\r\n" + "X-Other: " + forged)).problem(404);
            program.say("a\n" + forged + "\n", "", "X-Request-Id", "end-" + id).problem(422);
            only("end-" + id);
            for (String line : program.out()) {
                assertTrue(line.startsWith("{\"time\":") || !line.contains("forged-"),
                        "expected no line of a stranger's, actual: " + line);
                assertFalse(line.chars().anyMatch(Character::isISOControl) || line.contains("\u2028"),
                        "expected no control characters, actual: " + line);
            }
            assertEquals(ways.length, lines("forged-" + id).size(), "one line for each: " + lines("forged-" + id));
        }

        @Test void does_not_hold_what_people_write() throws Exception {
            String word = "private" + UUID.randomUUID();
            running().say("a", word).expect(201);
            program.say(word, "").problem(422);
            program.say("a", "x", "X-Request-Id", "after-" + word.substring(7)).expect(201);
            only("after-" + word.substring(7));
            assertFalse(program.out().toString().contains(word), "" + lines(word));
        }

        @Test void is_json_line_by_line() throws Exception {
            running().get("/nowhere").problem(404);
            for (String line : program.out())
                assertTrue(JsonParser.parseString(line).getAsJsonObject().has("event"),
                        "expected JSON with an event, actual: " + line);
        }
    }
}
