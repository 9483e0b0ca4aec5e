import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * Slow clients, each with a connection of its own: subscribers and readers of pages that read nothing or a byte a
 * second, and senders that send a byte of a request's head each half second.
 *
 * <p>{@code java SlowClients.java HOST PORT CURSOR SUBSCRIBERS PAGES SENDERS SECONDS}: the subscribers want the events
 * after CURSOR, the readers the largest pages, HTML and JSON in turn. After SECONDS it prints how many of them got a
 * connection (`opened`), how many senders still have one (`sending`), the statuses of the answers (`none` for a client
 * without one), and how many answers with 503 or 429 were `without-retry-after`. It needs JDK 21 and no library.
 */
public final class SlowClients {
    private static final int MAX_HEAD = 1_024;

    private final String host;
    private final int port;
    private final List<Client> readers = new ArrayList<>(), senders = new ArrayList<>();
    private int opened;

    private SlowClients(String host, int port) {
        this.host = host;
        this.port = port;
    }

    public static void main(String[] args) throws Exception {
        SlowClients clients = new SlowClients(args[0], Integer.parseInt(args[1]));
        for (int i = Integer.parseInt(args[3]); i > 0; i--) clients.read("/api/events?after=" + args[2], "*/*");
        for (int i = Integer.parseInt(args[4]); i > 0; i--)
            if (i % 2 == 0) clients.read("/?limit=100", "text/html");
            else clients.read("/api/messages?limit=100", "*/*");
        for (int i = Integer.parseInt(args[5]); i > 0; i--) clients.open(clients.senders, "GET / HTTP/1.1\r\nHost: ");
        clients.run(Integer.parseInt(args[6]));
        clients.report();
        System.exit(0); // closes all connections
    }

    private void read(String path, String accept) {
        open(readers, "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nAccept: " + accept + "\r\n\r\n");
    }

    private void open(List<Client> clients, String request) {
        try {
            clients.add(new Client(request));
            opened++;
        } catch (IOException e) { /* no room for more clients */ }
    }

    private void run(int seconds) throws InterruptedException {
        long end = System.nanoTime() + seconds * 1_000_000_000L;
        for (boolean reads = false; System.nanoTime() < end; reads = !reads) {
            Thread.sleep(500);
            senders.removeIf(sender -> !sender.sendByte());
            for (int i = 0; reads && i < readers.size(); i += 2) readers.get(i).readByte();
        }
    }

    private void report() {
        Map<String, Integer> statuses = new TreeMap<>();
        for (Client reader : readers) {
            while (reader.head.length() < MAX_HEAD && reader.readByte()) { /* the rest of the head */ }
            statuses.merge(reader.status(), 1, Integer::sum);
        }
        System.out.println("opened=" + opened + " sending=" + senders.size()
                + " without-retry-after=" + readers.stream().filter(Client::lacksRetryAfter).count()
                + " statuses=" + statuses.toString().replaceAll("[{} ]", "").replace('=', ':'));
    }

    private final class Client {
        private final StringBuilder head = new StringBuilder(); // what the client has read so far
        private final Socket socket = new Socket();

        Client(String request) throws IOException {
            socket.setReceiveBufferSize(4_096);
            socket.connect(new InetSocketAddress(host, port), 2_000);
            socket.setSoTimeout(1);
            socket.getOutputStream().write(request.getBytes(UTF_8));
        }

        /** @return false if there is nothing to read, or the connection is closed */
        boolean readByte() {
            byte[] one = new byte[1];
            try {
                if (socket.getInputStream().read(one) <= 0) return false;
                head.append(new String(one, ISO_8859_1));
                return true;
            } catch (IOException e) { return false; }
        }

        /** @return false if the connection is closed */
        boolean sendByte() {
            try {
                socket.getOutputStream().write('z');
                return true;
            } catch (IOException e) { return false; }
        }

        String status() { return head.length() < 12 ? "none" : head.substring(9, 12); }

        boolean lacksRetryAfter() {
            return List.of("503", "429").contains(status())
                    && !head.toString().toLowerCase().contains("\r\nretry-after: ");
        }
    }
}
