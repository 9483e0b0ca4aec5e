import org.junit.jupiter.api.*;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;
import redis.clients.jedis.Jedis;

import java.io.IOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.*;

import static org.junit.jupiter.api.Assertions.*;

/** The environment of an instance, and its error for each value that it cannot use. */
@ExtendWith(LogCapture.class)
class ConfigurationTest {

    static Config config(String... namesAndValues) throws Config.Invalid {
        Map<String, String> environment = new HashMap<>();
        for (int i = 0; i < namesAndValues.length; i += 2) environment.put(namesAndValues[i], namesAndValues[i + 1]);
        return Config.from(environment);
    }

    /** The error of a configuration with these values. */
    static String error(String... namesAndValues) {
        String error = assertThrows(Config.Invalid.class, () -> config(namesAndValues)).getMessage();
        assertTrue(error.lines().count() == 1 && !error.contains("\r"), "expected one line, actual: " + error);
        return error;
    }

    static void assertContains(String text, String... words) {
        for (String word : words) assertTrue(text.contains(word), "expected \"" + word + "\", actual: " + text);
    }

    static Path file(String name, String content) throws IOException {
        return Files.writeString(Servers.FOLDER.resolve(name), content);
    }

    @Nested class What_is_not_set {
        @Test void has_the_defaults_of_the_contract() throws Exception {
            Config config = config();
            assertEquals(9999, config.port());
            assertEquals("127.0.0.1", config.host());
            assertEquals(List.of(), config.redis().hosts());
            assertNull(config.redis().pass().value());
            assertEquals(List.of(), config.postgres().hosts());
            assertEquals("app", config.postgres().name());
            assertEquals("app", config.postgres().user());
            assertNull(config.postgres().pass().value());
            assertTrue(config.needsEmbedded());
            assertEquals(0, config.drainMillis());
            Config served = config("DB_HOST", "postgres", "REDIS_HOST", "redis");
            assertEquals("::", served.host());
            assertEquals("[redis:6379]", served.redis().hosts().toString());
            assertEquals("[postgres:5432]", served.postgres().hosts().toString());
            assertEquals(2500, served.drainMillis(), "longer than nginx keeps an idle connection");
        }

        @Test void keeps_the_data_in_the_home_folder() throws Exception {
            assertEquals(Path.of("/home/ann/.threefold"), config("HOME", "/home/ann").dataDir());
        }

        @Test void makes_the_host_name_the_instance() throws Exception {
            assertTrue(List.of("" + System.getenv("HOSTNAME"), InetAddress.getLocalHost().getHostName())
                    .contains(config().instance()), config().instance());
        }

        @Test void makes_a_name_of_any_host_name() throws Exception {
            try (Program named = Program.java(Map.of("INSTANCE_ID", "", "HOSTNAME", "ä b" + "x".repeat(70),
                    "DB_HOST", "127.0.0.1", "DB_PORT", "1", "REDIS_HOST", "127.0.0.1", "REDIS_PORT", "1"))) {
                Wait.until("it answers", Duration.ofSeconds(10), () -> named.get("/healthz").status() == 200);
                assertTrue(named.get("/healthz").text("instance").matches("[A-Za-z0-9._-]{64}"));
            }
            assertEquals("--", config("HOSTNAME", "\uD83D\uDE42\uFFFD").instance(), "of an emoji, and of no text");
        }

        @Test void is_the_same_as_what_is_empty() throws Exception {
            assertEquals(config(), config("PORT", "", "DB_HOST", "", "DB_PASS", "", "DB_PASS_FILE", "",
                    "INSTANCE_ID", ""));
        }

        @Test void is_not_embedded_when_both_hosts_are_set() throws Exception {
            assertFalse(config("DB_HOST", "postgres", "REDIS_HOST", "redis").needsEmbedded());
        }
    }

    @Nested class A_port {
        @ParameterizedTest @ValueSource(strings = {"0", "65536", "-1", "abc", "80.5", " 80", "80 ", "1e3", "0x50",
                "+80", "99999999999999999999", "٨٠", "８０", "80\n81"}) void that_is_none_is_refused(String value) {
            for (String name : List.of("PORT", "DB_PORT", "REDIS_PORT"))
                assertContains(error(name, value), name + "=", value.strip().substring(0, 1), "1", "65535");
        }

        @ParameterizedTest @ValueSource(strings = {"1", "80", "65535"})
        void that_is_one_is_taken(String value) throws Exception {
            Config config = config("PORT", value, "DB_HOST", "d", "DB_PORT", value, "REDIS_HOST", "r", "REDIS_PORT",
                    value);
            assertEquals(List.of(value, "[d:" + value + "]", "[r:" + value + "]"), List.of("" + config.port(),
                    config.postgres().hosts().toString(), config.redis().hosts().toString()));
        }
    }

    @Nested class A_password {
        @ParameterizedTest @ValueSource(strings = {"DB_PASS", "REDIS_PASS"})
        void in_a_file_is_read_without_its_line_end(String name) throws Exception {
            Config config = config(name + "_FILE", file("password", "s3cret word\n").toString());
            assertEquals("s3cret word", (name.equals("DB_PASS") ? config.postgres().pass() : config.redis().pass())
                    .value());
        }

        @ParameterizedTest @ValueSource(strings = {"DB_PASS", "REDIS_PASS"})
        void and_a_file_for_it_are_refused(String name) throws Exception {
            String file = file("password", "from-file").toString(),
                    error = error(name, "from-env", name + "_FILE", file);
            assertContains(error, name, name + "_FILE", file);
            assertFalse(error.contains("from-env") || error.contains("from-file"), error);
        }

        @ParameterizedTest @ValueSource(strings = {"/does/not/exist", "/", "relative/and/missing", "\u0000"})
        void file_that_is_not_there_is_refused(String file) {
            for (String name : List.of("DB_PASS_FILE", "REDIS_PASS_FILE")) assertContains(error(name, file), name);
        }

        @Test void in_an_address_is_not_printed() {
            String error = error("DB_HOST", "postgres://app:s3cret@db/app");
            assertContains(error, "DB_HOST", "db/app");
            assertFalse(error.contains("s3cret"), error);
        }

        @Test void is_in_no_text_that_shows_the_configuration() throws Exception {
            String text = config("DB_PASS", "hush-hush", "REDIS_PASS", "hush-hush").toString();
            assertFalse(text.contains("hush-hush"), text);
        }
    }

    @Nested class A_name_of_an_instance {
        @ParameterizedTest @ValueSource(strings = {"a b", "web/1", "wéb", "web\r\nSet-Cookie: x", "<b>", " ", "\"",
                "0123456789012345678901234567890123456789012345678901234567890123456789"})
        void that_does_not_fit_into_a_header_is_refused(String name) {
            assertContains(error("INSTANCE_ID", name), "INSTANCE_ID");
        }

        @ParameterizedTest @ValueSource(strings = {"web1", "a", "web-1.example_x", "0"})
        void that_is_plain_is_taken(String name) throws Exception {
            assertEquals(name, config("INSTANCE_ID", name).instance());
        }
    }

    @Nested class A_process {
        /** Expects the exit code 2 and one line on standard error, which it returns. */
        static String end(Map<String, String> environment) throws Exception {
            try (Program program = Program.java(environment)) {
                assertEquals(2, program.exitCode(), "exit code; standard error: " + program.err());
                assertEquals(1, program.err().size(), "lines on standard error: " + program.err());
                return program.err().getFirst();
            }
        }

        @ParameterizedTest @CsvSource({"PORT,abc,65535", "DB_PORT,0,65535", "REDIS_PORT,65536,65535",
                "INSTANCE_ID,a b,letters",
                "DB_PASS_FILE,/no/such/file,file", "REDIS_PASS_FILE,/no/such/file,file", "DATA_DIR,/dev/null/x,folder"})
        void ends_with_2_and_one_line_for_a_value_it_cannot_use(String name, String value,
                String right) throws Exception {
            assertContains(end(Map.of(name, value)), name, value, right);
        }

        @Test void names_both_variables_and_no_password_when_there_are_two() throws Exception {
            String file = file("password", "hush-hush").toString();
            String error = end(Map.of("DB_PASS", "hush-hush", "DB_PASS_FILE", file));
            assertContains(error, "DB_PASS", "DB_PASS_FILE");
            assertFalse(error.contains("hush-hush"), error);
        }

        @Test void ends_with_2_when_its_port_is_taken() throws Exception {
            try (ServerSocket taken = new ServerSocket(0)) {
                String port = "" + taken.getLocalPort();
                assertContains(end(Map.of("PORT", port, "DB_HOST", "127.0.0.1", "REDIS_HOST", "127.0.0.1")), "PORT",
                        port, "free");
            }
        }

        @Test void without_servers_of_its_own_needs_their_addresses() throws Exception {
            try (Program image = Program.withoutServers(Map.of("REDIS_HOST", "127.0.0.1"))) {
                assertEquals(2, image.exitCode(), "exit code; standard error: " + image.err());
                assertEquals(List.of("DB_HOST and REDIS_HOST have to be set: here are no servers to start"),
                        image.err());
            }
        }

        @Test void ends_with_one_line_even_if_the_value_has_two() throws Exception {
            assertContains(end(Map.of("PORT", "80\n81")), "PORT");
        }
    }

    @Nested class An_address_to_listen_on {
        @Test void is_each_address_behind_a_proxy_and_local_without_one() throws Exception {
            try (Instance everywhere = new Instance("dual")) {
                for (String address : List.of("127.0.0.1", "::1"))
                    new java.net.Socket(address, everywhere.port).close();
            }
            try (Instance here = new Instance("local", Servers.newDatabase(), "HOST", "127.0.0.1")) {
                here.get("/healthz").expect(200);
                assertThrows(IOException.class, () -> new java.net.Socket("::1", here.port).close());
            }
        }

        @ParameterizedTest @ValueSource(strings = {"203.0.113.7", "no.such.host.invalid"})
        void of_another_machine_is_refused(String host) throws Exception {
            assertContains(A_process.end(Map.of("HOST", host, "DB_HOST", "127.0.0.1", "REDIS_HOST", "127.0.0.1")),
                    "HOST", host);
        }
    }

    @Nested class Stores_elsewhere {
        @ParameterizedTest @ValueSource(strings = {"a,,b", ",", "db:0", "db:65536", "db:x", "[::1", "a b", "http://db",
                "db/app", "db?ssl=1", "db#1"}) void with_no_address_are_refused(String hosts) {
            for (String name : List.of("DB_HOST", "REDIS_SENTINELS")) assertContains(error(name, hosts), name, hosts);
        }

        @Test void with_a_password_in_the_address_are_refused_without_printing_it() {
            String error = error("DB_HOST", "me:secret@db");
            assertContains(error, "DB_HOST", "***@db");
            assertFalse(error.contains("secret"), error);
            String several = error("DB_HOST", "me:secret@db1,me:secret@db2");
            assertContains(several, "***@db2");
            assertFalse(several.contains("secret"), several);
        }

        /** It may hold any character. */
        @Test void with_an_odd_password_in_the_address_are_refused_without_it() {
            for (String value : List.of("me:my secret@db", "me:se,cret@db", "me:se\ncret@db", "me:s@cret@db"))
                assertContains(error("DB_HOST", value), "DB_HOST=\"***@db\"");
        }

        @Test void with_a_user_in_the_address_are_refused() { assertContains(error("DB_HOST", "me@db"), "***@db"); }

        @Test void may_be_several() throws Exception {
            assertEquals("[db1:5432, db2:5433, ::1:5432]",
                    config("DB_HOST", "db1,db2:5433,::1").postgres().hosts().toString());
            Config.RedisAddress redis = config("REDIS_SENTINELS", "s1,s2,s3:1").redis();
            assertEquals("[s1:26379, s2:26379, s3:1]", redis.hosts().toString());
            assertEquals("threefold", redis.master());
            assertEquals("board", config("REDIS_SENTINELS", "s1", "REDIS_MASTER", "board").redis().master());
        }

        @Test void are_configured_in_one_way_only() { assertContains(error("REDIS_HOST", "a", "REDIS_SENTINELS", "b"),
                "REDIS_HOST"); }

        @Test void are_one_Redis_or_several_Sentinels() {
            assertContains(error("REDIS_HOST", "r1,r2"), "REDIS_HOST", "r1,r2", "REDIS_SENTINELS");
        }

        @ParameterizedTest @CsvSource({"DB_SSLMODE,maybe,verify-full", "REDIS_TLS,yes,true",
                "DB_SSLROOTCERT,/no/such/file,file", "REDIS_DB,-1,0", "REDIS_WAIT_REPLICAS,x,100"})
        void with_an_option_that_cannot_be_used_are_refused(String name, String value, String right) {
            assertContains(error(name, value), name, value, right);
        }
    }

    /** Servers that require a password: a Redis of its own, and a database of the shared PostgreSQL. */
    @Nested class Passwords {
        private static Embedded redis;
        private static String database, port;

        @BeforeAll static void lockUp() throws Exception {
            redis = new Embedded(config("DATA_DIR", Servers.FOLDER.resolve("locked").toString(), "DB_HOST", "none"));
            Map<String, String> address = redis.start(Map.of("DB_HOST", "none"));
            port = address.get("REDIS_PORT");
            try (Jedis jedis = new Jedis("127.0.0.1", Integer.parseInt(port))) {
                jedis.auth(address.get("REDIS_PASS"));
                jedis.configSet("requirepass", "open sesame");
            }
            database = Servers.newDatabase();
            Servers.sql(database, "CREATE ROLE keeper LOGIN PASSWORD 'pick me not'; GRANT ALL ON SCHEMA public "
                    + "TO keeper");
            Path access = Path.of(Servers.sql("postgres", "SHOW hba_file").getFirst());
            Files.writeString(access, "host " + database + " keeper 127.0.0.1/32 scram-sha-256\n"
                    + Files.readString(access));
            Servers.sql("postgres", "SELECT pg_reload_conf()");
        }

        @AfterAll static void close() { if (redis != null) redis.close(); }

        private static void opens(String... passwords) {
            try (Instance instance = new Instance("guest", database,
                    Caller.and(passwords, "REDIS_PORT", port, "DB_USER", "keeper"))) {
                instance.awaitReady();
                instance.save("keeper", "let in").expect(201);
                assertTrue(instance.visits() > 0);
            }
        }

        @Test void from_variables_open_both() { opens("DB_PASS", "pick me not", "REDIS_PASS", "open sesame"); }

        @Test void from_files_open_both() throws Exception {
            opens("DB_PASS", "", "DB_PASS_FILE", file("db", "pick me not\n").toString(),
                    "REDIS_PASS", "", "REDIS_PASS_FILE", file("redis", "open sesame\n").toString());
        }

        @Test void that_are_wrong_are_not_printed() throws Exception {
            try (Program program = Program.java(Servers.environment(database, "DB_USER", "keeper",
                    "REDIS_PORT", port, "DB_PASS", "my-guess-1", "REDIS_PASS", "my-guess-2"))) {
                Wait.until("it is up", () -> program.get("/healthz").status() == 200);
                program.save("keeper", "let in").unavailable();
                assertFalse(program.counts());
                program.get("/readyz").expect(503);
                Wait.until("it logs the reason", () -> program.out().toString().contains("store_refused"));
                String error = program.out() + "" + program.err();
                assertFalse(error.contains("my-guess"), error);
            }
        }
    }
}
