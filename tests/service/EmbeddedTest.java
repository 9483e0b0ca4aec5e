import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Nested;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermission;
import java.nio.file.attribute.PosixFilePermissions;
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
import static org.junit.jupiter.api.Assumptions.assumeTrue;

/** `jbang Service.java` on its own, as a program: the servers it brings along, its data, its signals, and its log. */
@ExtendWith(LogCapture.class)
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
            Wait.until("those left behind are stopped", // or zombies, for a moment
                    () -> servers.stream().noneMatch(ProcessHandle::isAlive));
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
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("half"));
            Files.createDirectories(folder.resolve("postgres.part/base"));
            Files.createFile(folder.resolve("threefold-data"));
            try (Program begun = Program.java(Map.of("DATA_DIR", folder.toString()))) {
                begun.awaitReady();
                assertFalse(Files.exists(folder.resolve("postgres.part")));
            }
            cutPrograms(folder); // killed while they were unpacked
            try (Program begun = Program.java(Map.of("DATA_DIR", folder.toString()))) { begun.awaitReady(); }
        }

        private static void cutPrograms(Path folder) throws Exception {
            Path all = folder.resolve("postgres-bin"), part = all.resolve("part");
            try (Stream<Path> versions = Files.list(all)) { Files.move(versions.findFirst().orElseThrow(), part); }
            Files.write(part.resolve("bin/postgres"), new byte[1_000]);
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

    /** What another user of the same machine can get, and do. */
    @Nested class Others {
        @Test void can_neither_look_into_the_folder_nor_put_anything_there() throws Exception {
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("open"));
            Files.setPosixFilePermissions(folder, rights("rwxr-xr-x"));
            try (Program open = Program.javaAfter("umask 000", Map.of("DATA_DIR", folder.toString()))) {
                open.awaitReady();
                try (Stream<Path> files = Stream.concat(Stream.of(folder), Files.list(folder))) {
                    for (Path file : files.filter(Files::isDirectory).toList())
                        assertEquals(rights("rwx------"), Files.getPosixFilePermissions(file), "" + file);
                }
                assumeTrue(asRoot());
                Process other = new ProcessBuilder("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ls",
                        folder.toString()).redirectErrorStream(true).start();
                String saw = new String(other.getInputStream().readAllBytes());
                assertTrue(other.waitFor() != 0, "expected that nobody sees nothing, actual: " + saw);
            }
        }

        @Test void can_not_log_in_while_it_starts_for_the_first_time() throws Exception {
            Path folder = Servers.FOLDER.resolve("first"), pid = folder.resolve("postgres/postmaster.pid");
            int refused = 0;
            try (Program first = Program.java(Map.of("DATA_DIR", folder.toString()))) {
                while (first.process.isAlive() && refused < 5) {
                    List<String> lines = Files.exists(pid) ? Files.readAllLines(pid) : List.of();
                    if (lines.size() < 4 || lines.get(3).isBlank()) continue;
                    try (var in = java.sql.DriverManager.getConnection("jdbc:postgresql://127.0.0.1:"
                            + lines.get(3).strip() + "/postgres?connectTimeout=1", "postgres", "guess")) {
                        throw new AssertionError("expected a refusal, actual: let in by " + in);
                    } catch (java.sql.SQLException e) { if (e.getSQLState().startsWith("28")) refused++; }
                }
                first.awaitReady();
            }
        }

        @Test void see_no_password_in_the_list_of_processes() throws Exception {
            running();
            String password = Files.readString(DATA.resolve("password"));
            for (ProcessHandle server : servers(DATA)) {
                Path proc = Path.of("/proc/" + server.pid());
                assumeTrue(Files.exists(proc));
                for (String file : List.of("cmdline", "environ"))
                    assertFalse(Files.readString(proc.resolve(file), java.nio.charset.StandardCharsets.ISO_8859_1)
                            .contains(password), file);
            }
        }

        /** Of the library that was used once. */
        @Test void have_no_file_that_would_be_in_the_way() throws Exception {
            Path file = Servers.FOLDER.resolve("embedded-pg");
            Files.createFile(file);
            try (Program program = Program.java(Map.of("DATA_DIR", Servers.FOLDER.resolve("alone").toString()))) {
                program.awaitReady();
            } finally { Files.delete(file); }
        }

        @Test void keep_their_folder_also_where_root_could_take_it() throws Exception {
            assumeTrue(asRoot());
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("theirs"));
            Files.setOwner(folder, folder.getFileSystem().getUserPrincipalLookupService()
                    .lookupPrincipalByName("nobody"));
            ConfigurationTest.assertSays(ConfigurationTest.A_process.end(Map.of("DATA_DIR", folder.toString())),
                    "DATA_DIR", folder.toString(), "nobody");
            try (Stream<Path> files = Files.list(folder)) { assertEquals(List.of(), files.toList()); }
        }

        private static Set<PosixFilePermission> rights(String text) { return PosixFilePermissions.fromString(text); }
    }

    static boolean asRoot() { return System.getProperty("user.name").equals("root"); }

    @Nested class In_any_locale {
        @Test void its_data_are_the_same() throws Exception {
            Path folder = Servers.FOLDER.resolve("foreign");
            try (Program foreign = Program.java(Map.of("DATA_DIR", folder.toString(), "LC_ALL", "xx_XX.UTF-8"))) {
                foreign.awaitReady();
                String port = Files.readAllLines(folder.resolve("postgres/postmaster.pid")).get(3).strip();
                try (var look = java.sql.DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + port
                        + "/postgres", "postgres", Files.readString(folder.resolve("password")));
                     var row = look.createStatement().executeQuery("SELECT concat(datlocprovider, datlocale, "
                             + "datcollate) FROM pg_database WHERE datname = 'postgres'")) {
                    row.next();
                    assertEquals("bC.UTF-8C", row.getString(1));
                }
            }
        }

        @Test void its_folder_may_have_a_name_in_any_script() throws Exception {
            Path folder = Servers.FOLDER.resolve("\u00fc\u65e5 '(1)");
            try (Program named = Program.jbang(Map.of("DATA_DIR", folder.toString(), "LC_ALL", "C"))) {
                Wait.until("ready", Duration.ofSeconds(50), () -> named.get("/readyz").status() == 200);
                assertTrue(Files.exists(folder.resolve("postgres/PG_VERSION")));
            }
        }

        @ParameterizedTest @ValueSource(strings = {"DATA_DIR", "HOME", "DB_HOST", "DB_PASS", "DB_PASS_FILE",
                "REDIS_SENTINELS", "INSTANCE_ID"})
        void a_value_that_can_not_be_read_in_it_is_no_other_value(String name) throws Exception {
            String said = ConfigurationTest.A_process.end(Map.of(name, "/Gr\u00fc\u00dfe", "LC_ALL", "C"));
            ConfigurationTest.assertSays(said, name + " cannot be read", "LC_ALL=C.UTF-8");
            assertFalse(said.contains("/Gr"), "expected no value, which may be a password, actual: " + said);
        }
    }

    @Nested class What_does_not_start {
        @ParameterizedTest @ValueSource(strings = {"$(id)", "a\"b", "a`b", "a\\b", "a\nb"})
        void has_a_folder_that_initdb_can_not_use(String name) throws Exception {
            ConfigurationTest.assertSays(ConfigurationTest.A_process.end(Map.of("DATA_DIR",
                    Servers.FOLDER.resolve(name).toString())), "DATA_DIR", "a name without");
        }

        @Test void says_why_in_its_own_words() throws Exception {
            Path folder = Servers.FOLDER.resolve("broken"), version = folder.resolve("postgres/PG_VERSION");
            try (Program whole = Program.java(Map.of("DATA_DIR", folder.toString()))) { whole.awaitReady(); }
            Files.writeString(version, "17\n");
            ConfigurationTest.assertSays(ConfigurationTest.A_process.end(Map.of("DATA_DIR", folder.toString())),
                    "FATAL", "incompatible", folder.toString());
            Files.writeString(version, "18\n");
            Files.writeString(folder.resolve("redis/appendonly.aof"), "no command\n");
            ConfigurationTest.assertSays(ConfigurationTest.A_process.end(Map.of("DATA_DIR", folder.toString())),
                    "redis-server", "Bad file format", folder.toString());
            Wait.until("no process is left", () -> servers(folder).stream().noneMatch(ProcessHandle::isAlive));
        }

        @Test void as_root_without_unshare_says_so() throws Exception {
            assumeTrue(asRoot());
            Path path = Files.createDirectories(Servers.FOLDER.resolve("path"));
            Files.createSymbolicLink(path.resolve("sh"), Path.of("/bin/sh"));
            ConfigurationTest.assertSays(ConfigurationTest.A_process.end(Map.of("PATH", path.toString(), "DATA_DIR",
                    Servers.FOLDER.resolve("root").toString())), "root", "unshare", "another user");
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

        @Test void lets_redis_count_for_the_last_request_too() throws Exception {
            try (Program leaving = Program.java(Map.of("DATA_DIR", Servers.FOLDER.resolve("leaving").toString(),
                    "DRAIN_MILLIS", "3000"))) {
                leaving.awaitReady();
                signal("TERM", Stream.of(leaving.process.toHandle()));
                servesAndThenEnds(leaving, Servers.FOLDER.resolve("leaving"));
            }
        }

        /** A terminal sends the signal to all that were started there, and so to the servers if they were there. */
        @Test void by_Ctrl_C_is_the_end_of_its_servers_last() throws Exception {
            assumeTrue(Files.exists(Path.of("/usr/bin/script")) && Files.exists(Path.of("/proc/self")));
            Path data = Servers.FOLDER.resolve("terminal");
            try (Program typed = Program.atTerminal(Map.of("DATA_DIR", data.toString(), "DRAIN_MILLIS", "3000"))) {
                typed.awaitReady();
                typed.process.getOutputStream().write(3);
                typed.process.getOutputStream().flush();
                servesAndThenEnds(typed, data);
            }
        }

        private static void servesAndThenEnds(Program leaving, Path data) throws Exception {
            List<ProcessHandle> servers = servers(data);
            assertEquals(2, servers.size());
            Wait.until("it drains", () -> leaving.out().toString().contains("draining"));
            for (int i = 0; i < 10; i++) {
                assertFalse(leaving.get("/").expect(200).json().get("visits").isJsonNull(), "expected a count");
                leaving.say("a", "at the end").expect(201);
                Thread.sleep(100);
            }
            leaving.exitCode();
            Wait.until("no process is left of " + servers, () -> servers.stream().noneMatch(ProcessHandle::isAlive));
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
                Wait.until("it is noticed", Wait.PROMISED, 
                        () -> OutageTest.status(program).equals("degraded"));
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
            String trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
            running().say("a", "x".repeat(2_001), "X-Request-Id", id, "traceparent", trace).problem(422);
            JsonObject line = only(id);
            assertEquals(trace, line.get("traceparent").getAsString());
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
