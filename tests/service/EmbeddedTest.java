import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

import java.io.IOException;
import java.nio.file.*;
import java.nio.file.attribute.PosixFilePermission;
import java.nio.file.attribute.PosixFilePermissions;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.time.Duration;
import java.util.*;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static org.junit.jupiter.api.Assertions.*;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

/** `jbang Service.java` on its own, as a program: its embedded stores, its data, its signals, and its log. */
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

    /** The program, started again if an earlier test ended it. */
    static Program running() throws IOException {
        if (!program.process.isAlive()) program = start(DATA);
        Wait.until("ready, or ended", Duration.ofSeconds(30), () -> !program.process.isAlive()
                || program.get("/readyz").status() == 200);
        assertTrue(program.process.isAlive(), "expected that it runs, actual: it ended with " + program.err());
        program.awaitReady();
        return program;
    }

    private static Program start(Path data, String... namesAndValues) throws IOException {
        Map<String, String> environment = new HashMap<>(Map.of("DATA_DIR", data.toString()));
        for (int i = 0; i < namesAndValues.length; i += 2) environment.put(namesAndValues[i], namesAndValues[i + 1]);
        return Program.java(environment);
    }

    /** Expects that it ends with one line that has these words. */
    private static void fails(Path data, String... words) throws Exception {
        ConfigurationTest.assertContains(ConfigurationTest.A_process.end(Map.of("DATA_DIR", data.toString())), words);
    }

    /** PostgreSQL and Redis, as their own files name them. */
    static List<ProcessHandle> servers(Path data) throws IOException {
        List<ProcessHandle> found = new ArrayList<>();
        for (Path file : List.of(data.resolve("postgres/postmaster.pid"), data.resolve("redis/redis.pid")))
            if (Files.exists(file)) Files.readAllLines(file).stream().limit(1).filter(line -> line.matches("\\d+"))
                    .flatMap(pid -> ProcessHandle.of(Long.parseLong(pid)).stream()).forEach(found::add);
        return found;
    }

    /** A process that has ended is a zombie for a moment. */
    private static void awaitEnd(List<ProcessHandle> servers) {
        Wait.until("no process is left of " + servers, () -> servers.stream().noneMatch(ProcessHandle::isAlive));
    }

    static void signal(String signal, Stream<ProcessHandle> processes) throws Exception {
        for (ProcessHandle process : processes.toList()) new ProcessBuilder("kill", "-" + signal, "" + process.pid())
                .start().waitFor();
    }

    @Nested class Its_data {
        @Test void are_in_a_folder_that_the_log_names() throws Exception {
            String folder = DATA.toString();
            running();
            Wait.until("the log names " + folder, () -> program.out().stream().anyMatch(line -> line.contains(folder)));
        }

        @Test void are_still_there_when_it_was_stopped_and_started_again() throws Exception {
            String key = UUID.randomUUID().toString();
            Answer kept = running().save("keeper", "kept \uD83D\uDE42", "Idempotency-Key", key).expect(201);
            long visits = program.visits();
            List<ProcessHandle> servers = servers(DATA);
            assertEquals(2, servers.size());
            program.close(); // SIGTERM
            assertNotEquals(137, program.exitCode(), "it ended by itself");
            awaitEnd(servers);
            assertEquals(kept.json(), running().get(kept.header("location")).expect(200).json());
            assertEquals(visits + 1, program.visits());
            assertEquals(kept.json(), program.save("keeper", "kept \uD83D\uDE42", "Idempotency-Key", key).expect(200)
                    .json());
        }

        @Test void are_still_there_when_it_was_killed() throws Exception {
            Answer kept = running().save("keeper", "kept through kill -9").expect(201);
            long visits = program.visits();
            List<ProcessHandle> servers = servers(DATA);
            program.process.destroyForcibly().waitFor();
            assertTrue(servers.stream().allMatch(ProcessHandle::isAlive), "its servers were left behind");
            assertEquals(kept.json(), running().get(kept.header("location")).expect(200).json());
            assertEquals(visits + 1, program.visits());
            awaitEnd(servers);
        }

        @Test void take_no_folder_with_other_files() throws Exception {
            Path folder = Servers.FOLDER.resolve("other"), theirs = folder.resolve("postgres/precious");
            Files.createDirectories(theirs.getParent());
            Files.writeString(theirs, "mine");
            fails(folder, "DATA_DIR", folder.toString(), "empty", "postgres");
            assertEquals("mine", Files.readString(theirs));
            try (Stream<Path> files = Files.list(folder)) { assertEquals(List.of(theirs.getParent()), files.toList()); }
        }

        @Test void that_were_never_complete_are_created_again() throws Exception {
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("half"));
            Files.createDirectories(folder.resolve("postgres.part/base"));
            Files.createFile(folder.resolve("threefold-data"));
            try (Program begun = start(folder)) {
                begun.awaitReady();
                assertFalse(Files.exists(folder.resolve("postgres.part")));
            }
            cutPrograms(folder); // killed while they were unpacked
            try (Program begun = start(folder)) { begun.awaitReady(); }
        }

        private static void cutPrograms(Path folder) throws Exception {
            Path all = folder.resolve("postgres-bin"), part = all.resolve("part");
            try (Stream<Path> versions = Files.list(all)) { Files.move(versions.findFirst().orElseThrow(), part); }
            Files.write(part.resolve("bin/postgres"), new byte[1_000]);
        }

        @Test void need_the_password() throws Exception {
            running();
            int port = Integer.parseInt(Files.readAllLines(DATA.resolve("postgres/postmaster.pid")).get(3).strip());
            SQLException refused = assertThrows(SQLException.class,
                    () -> DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + port + "/postgres",
                            "postgres", "guess"));
            assertTrue(refused.getSQLState().startsWith("28"), "" + refused);
            assertEquals("rw-------", PosixFilePermissions.toString(
                    Files.getPosixFilePermissions(DATA.resolve("password"))));
        }

        /** The number in a pid file may belong to another process by now, even to one with such a name. */
        @Test void end_no_process_of_another_program() throws Exception {
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("others"));
            Path other = Files.copy(Path.of("/bin/sleep"), Servers.FOLDER.resolve("redis-server-of-another-program"),
                    StandardCopyOption.COPY_ATTRIBUTES);
            Process process = new ProcessBuilder(other.toString(), "60").start();
            try {
                Files.createFile(folder.resolve("threefold-data"));
                Files.createDirectories(folder.resolve("redis"));
                Files.writeString(folder.resolve("redis/redis.pid"), process.pid() + "\n");
                try (Program begun = start(folder)) {
                    begun.awaitReady();
                    assertTrue(process.isAlive(), "expected that the other program still runs");
                }
            } finally { process.destroy(); }
        }

        /** PostgreSQL itself would not start while another process has the number in its file. */
        @Test void are_used_although_another_process_has_the_number_of_their_server() throws Exception {
            Path folder = Servers.FOLDER.resolve("reused");
            try (Program first = start(folder)) {
                first.awaitReady();
                first.save("a", "before").expect(201);
            }
            Process other = new ProcessBuilder("sleep", "60").start();
            try {
                Files.writeString(folder.resolve("postgres/postmaster.pid"), other.pid() + "\n" + folder
                        .resolve("postgres") + "\n1\n1\n\nlocalhost\n  1 1\nready\n");
                try (Program again = start(folder)) {
                    again.awaitReady();
                    assertTrue(again.get("/api/messages").body().contains("before"));
                    assertTrue(other.isAlive());
                }
            } finally { other.destroy(); }
        }

        @Test void are_not_shared_with_a_second_instance() throws Exception {
            long visits = running().visits();
            try (Program second = start(DATA)) {
                assertEquals(2, second.exitCode(), "" + second.err());
                assertEquals(1, second.err().size(), "" + second.err());
                ConfigurationTest.assertContains(second.err().getFirst(), "DATA_DIR", DATA.toString());
            }
            assertEquals(visits + 1, program.visits());
            program.save("first", "not disturbed").expect(201);
        }
    }

    /** Other users of the machine. */
    @Nested class Others {
        @Test void can_neither_read_the_folder_nor_write_to_it() throws Exception {
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
                assertTrue(other.waitFor() != 0, "expected no access for the user nobody, actual: " + saw);
            }
        }

        @Test void cannot_log_in_while_it_starts_for_the_first_time() throws Exception {
            Path folder = Servers.FOLDER.resolve("first"), pid = folder.resolve("postgres/postmaster.pid");
            int refused = 0;
            try (Program first = start(folder)) {
                while (first.process.isAlive() && refused < 5) {
                    List<String> lines = Files.exists(pid) ? Files.readAllLines(pid) : List.of();
                    if (lines.size() < 4 || lines.get(3).isBlank()) continue;
                    try (var in = DriverManager.getConnection("jdbc:postgresql://127.0.0.1:"
                            + lines.get(3).strip() + "/postgres?connectTimeout=1", "postgres", "guess")) {
                        throw new AssertionError("expected a refusal, actual: let in by " + in);
                    } catch (SQLException e) { if (e.getSQLState().startsWith("28")) refused++; }
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
                    assertFalse(Files.readString(proc.resolve(file), ISO_8859_1)
                            .contains(password), file);
            }
        }

        @Test void keep_their_folder_also_where_root_could_take_it() throws Exception {
            assumeTrue(asRoot());
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("theirs"));
            Files.setOwner(folder, folder.getFileSystem().getUserPrincipalLookupService()
                    .lookupPrincipalByName("nobody"));
            fails(folder, "DATA_DIR", folder.toString(), "nobody");
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
                try (var look = DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + port
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
        void a_value_that_cannot_be_read_in_it_is_an_error(String name) throws Exception {
            String error = ConfigurationTest.A_process.end(Map.of(name, "/Gr\u00fc\u00dfe", "LC_ALL", "C"));
            ConfigurationTest.assertContains(error, name + " cannot be read", "LC_ALL=C.UTF-8");
            assertFalse(error.contains("/Gr"), "expected no value, which may be a password, actual: " + error);
        }
    }

    @Nested class A_failed_start {
        @ParameterizedTest @ValueSource(strings = {"$(id)", "a\"b", "a`b", "a\\b", "a\nb"})
        void is_due_to_a_folder_that_initdb_cannot_use(String name) throws Exception {
            ConfigurationTest.assertContains(ConfigurationTest.A_process.end(Map.of("DATA_DIR",
                    Servers.FOLDER.resolve(name).toString())), "DATA_DIR", "a name without");
        }

        @Test void prints_the_reason_of_the_server() throws Exception {
            Path folder = Servers.FOLDER.resolve("broken"), version = folder.resolve("postgres/PG_VERSION");
            try (Program whole = start(folder)) { whole.awaitReady(); }
            Files.writeString(version, "17\n");
            fails(folder, "FATAL", "incompatible", folder.toString());
            Files.writeString(version, "18\n");
            Files.writeString(folder.resolve("redis/appendonly.aof"), "no command\n");
            fails(folder, "redis-server", "Bad file format", folder.toString());
            awaitEnd(servers(folder));
        }

        @Test void as_root_without_unshare_prints_a_way_out() throws Exception {
            assumeTrue(asRoot());
            Path path = Files.createDirectories(Servers.FOLDER.resolve("path"));
            try (Stream<Path> programs = Files.list(Path.of("/usr/bin"))) {
                for (Path program : programs.filter(program -> !program.endsWith("unshare")).toList())
                    Files.createSymbolicLink(path.resolve(program.getFileName()), program);
            }
            ConfigurationTest.assertContains(ConfigurationTest.A_process.end(Map.of("PATH", path.toString(), "DATA_DIR",
                    Servers.FOLDER.resolve("root").toString())), "root", "unshare", "another user");
        }
    }

    @Nested class Its_end {
        @Test void while_it_starts_leaves_no_process() throws Exception {
            Path data = Servers.FOLDER.resolve("interrupted");
            try (Program starting = start(data)) {
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

        @Test void comes_before_that_of_its_stores() throws Exception {
            try (Program stopping = Program.java(Map.of("DATA_DIR", Servers.FOLDER.resolve("stopping").toString(),
                    "DRAIN_MILLIS", "3000"))) {
                stopping.awaitReady();
                signal("TERM", Stream.of(stopping.process.toHandle()));
                servesThenEnds(stopping, Servers.FOLDER.resolve("stopping"));
            }
        }

        /** A terminal sends the signal to all processes of its session; the servers have sessions of their own. */
        @Test void by_Ctrl_C_comes_before_that_of_its_stores() throws Exception {
            assumeTrue(Files.exists(Path.of("/usr/bin/script")) && Files.exists(Path.of("/proc/self")));
            Path data = Servers.FOLDER.resolve("terminal");
            try (Program typed = Program.atTerminal(Map.of("DATA_DIR", data.toString(), "DRAIN_MILLIS", "3000"))) {
                typed.awaitReady();
                typed.process.getOutputStream().write(3);
                typed.process.getOutputStream().flush();
                servesThenEnds(typed, data);
            }
        }

        private static void servesThenEnds(Program stopping, Path data) throws Exception {
            List<ProcessHandle> servers = servers(data);
            assertEquals(2, servers.size());
            Wait.until("it drains", () -> stopping.out().toString().contains("draining"));
            for (int i = 0; i < 10; i++) {
                assertFalse(stopping.get("/").expect(200).json().get("visits").isJsonNull(), "expected a count");
                stopping.save("a", "at the end").expect(201);
                Thread.sleep(100);
            }
            stopping.exitCode();
            awaitEnd(servers);
        }
    }

    /** As on a machine that swaps: the servers exist and do not respond. */
    @Nested class When_stopped_by_a_signal {
        @Test void redis_costs_only_the_count_and_only_while_it_is_stopped() throws Exception {
            long visits = running().visits();
            ProcessHandle redis = servers(DATA).getLast();
            signal("STOP", Stream.of(redis));
            try {
                assertTrue(OutageTest.inTime(() -> program.get("/")).expect(200).json().get("visits").isJsonNull());
                OutageTest.inTime(() -> program.save("a", "without Redis")).expect(201);
                OutageTest.inTime(() -> program.get("/api/visits")).unavailable();
            } finally { signal("CONT", Stream.of(redis)); }
            Wait.until("it counts again", Wait.PROMISED, () -> program.visits() > visits);
        }

        @Test void postgres_costs_only_messages_and_only_while_it_is_stopped() throws Exception {
            Answer kept = running().save("a", "before the stop").expect(201);
            ProcessHandle postgres = servers(DATA).getFirst();
            List<ProcessHandle> all = Stream.concat(Stream.of(postgres), postgres.descendants()).toList();
            signal("STOP", all.stream());
            try {
                OutageTest.inTime(() -> program.save("a", "never arrives")).unavailable();
                OutageTest.inTime(() -> program.get(kept.header("location"))).unavailable();
                Wait.until("it is noticed", Wait.PROMISED, () -> program.status().equals("degraded"));
                assertTrue(program.visits() > 0);
            } finally { signal("CONT", all.stream()); }
            Wait.until("messages are back", Wait.PROMISED,
                    () -> program.get(kept.header("location")).status() == 200);
            Wait.until("they are stored again", Wait.PROMISED, () -> program.save("a", "stored").status() == 201);
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

        @Test void has_one_line_with_the_reason_of_a_rejection() throws Exception {
            String id = UUID.randomUUID().toString();
            String trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
            running().save("a", "x".repeat(2_001), "X-Request-Id", id, "traceparent", trace).problem(422);
            JsonObject line = only(id);
            assertEquals(trace, line.get("traceparent").getAsString());
            assertTrue(line.keySet().containsAll(Set.of("time", "level", "instance", "event", "request", "method",
                    "path", "status", "reason")), "" + line);
            assertEquals(List.of("program", "POST", "/api/messages", "422"),
                    List.of(line.get("instance").getAsString(), line.get("method").getAsString(),
                    line.get("path").getAsString(), line.get("status").getAsString()));
            assertTrue(line.get("reason").getAsString().contains("2001"), "" + line);
        }

        @Test void has_no_line_that_a_client_forged() throws Exception {
            String id = UUID.randomUUID().toString(), forged = "{\"event\":\"forged-" + id + "\"}";
            String[] ways = {"/x%0a%7b%22event%22:%22forged-" + id + "%22%7d%0a", "/%0d%0aforged-" + id,
                    "/%E2%80%A8forged-" + id, "/%1b%5b2Jforged-" + id};
            for (String path : ways) running().raw(HttpTest.request("GET", path)).problem(404);
            program.raw(HttpTest.request("GET", "/nowhere", "X-Request-Id: a\r\n" + "X-Other: " + forged)).problem(404);
            program.save("a\n" + forged + "\n", "", "X-Request-Id", "end-" + id).problem(422);
            only("end-" + id);
            for (String line : program.out()) {
                assertTrue(line.startsWith("{\"time\":") || !line.contains("forged-"),
                        "expected no line of a other's, actual: " + line);
                assertFalse(line.chars().anyMatch(Character::isISOControl) || line.contains("\u2028"),
                        "expected no control characters, actual: " + line);
            }
            assertEquals(ways.length, lines("forged-" + id).size(), "one line for each: " + lines("forged-" + id));
        }

        @Test void has_no_text_of_messages() throws Exception {
            String word = "private" + UUID.randomUUID();
            running().save("a", word).expect(201);
            program.save(word, "").problem(422);
            program.save("a", "x", "X-Request-Id", "after-" + word.substring(7)).expect(201);
            only("after-" + word.substring(7));
            assertFalse(program.out().toString().contains(word), "" + lines(word));
        }

        /** Behind a pipe that is full 1,024 lines wait. */
        @Test void says_once_how_many_lines_its_reader_was_too_slow_for() throws Exception {
            Path pipe = Servers.FOLDER.resolve("pipe");
            new ProcessBuilder("mkfifo", pipe.toString()).start().waitFor();
            try (Program unread = Program.javaAfter("exec >'" + pipe + "'", Map.of("DB_HOST", "127.0.0.1", "DB_PORT",
                    "1", "REDIS_HOST", "127.0.0.1", "REDIS_PORT", "1")); var log = Files.newBufferedReader(pipe)) {
                Wait.until("it answers", () -> unread.get("/healthz").status() == 200);
                for (int i = 0; i < 2_500; i++) unread.get("/nowhere").expect(404);
                String line = log.readLine();
                while (!line.contains("log_lines_dropped")) line = log.readLine();
                assertTrue(JsonParser.parseString(line).getAsJsonObject().get("count").getAsInt() > 500, line);
                unread.get("/nowhere", "X-Request-Id", "the-last").expect(404);
                while (!line.contains("the-last")) {
                    line = log.readLine();
                    assertFalse(line.contains("log_lines_dropped"), line);
                }
            }
        }

        @Test void is_json_line_by_line() throws Exception {
            running().get("/nowhere").problem(404);
            for (String line : program.out())
                assertTrue(JsonParser.parseString(line).getAsJsonObject().has("event"),
                        "expected JSON with an event, actual: " + line);
        }
    }
}
