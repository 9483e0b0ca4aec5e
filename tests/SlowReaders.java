import java.io.IOException;
import java.io.OutputStream;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.util.ArrayList;
import java.util.List;

import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * The rude clients of tests/failover: they ask for much and read nothing, or a byte a second.
 *
 * <p>{@code java SlowReaders.java HOST PORT VIEWERS PAGES SECONDS} opens so many streams of events from the first
 * message
 * on, and asks for so many of the largest pages, HTML and JSON in turn, each on a connection of its own. Every second
 * one
 * reads a byte a second. First it stores 120 of the longest messages, so that there is much to send. JDK 21, nothing
 * else.
 */
public final class SlowReaders {
    public static void main(String[] args) throws Exception {
        String host = args[0];
        int port = Integer.parseInt(args[1]), viewers = Integer.parseInt(args[2]), pages = Integer.parseInt(args[3]);
        for (int i = 0; i < 120; i++) store(host, port, i);
        List<Socket> sockets = new ArrayList<>();
        for (int i = 0; i < viewers + pages; i++) {
            String path = i < viewers ? "/api/events?after=1" : i % 2 == 0 ? "/?limit=100" : "/api/messages?limit=100";
            try {
                sockets.add(ask(host, port, path));
            } catch (IOException e) { /* no room for more: as it should be */ }
        }
        System.out.println("open=" + sockets.size());
        long end = System.nanoTime() + Integer.parseInt(args[4]) * 1_000_000_000L;
        while (System.nanoTime() < end) {
            Thread.sleep(1_000);
            for (int i = 0; i < sockets.size(); i += 2) readOne(sockets.get(i));
        }
        System.exit(0);
    }

    private static void store(String host, int port, int number) throws IOException {
        byte[] body = ("{\"author\":\"test-failover\",\"body\":\"" + "\ud83d\ude42".repeat(1_990) + number + "\"}")
                .getBytes(UTF_8);
        try (Socket socket = new Socket(host, port)) {
            OutputStream out = socket.getOutputStream();
            out.write(("POST /api/messages HTTP/1.1\r\nHost: " + host
                    + "\r\nConnection: close\r\nContent-Type: application/json\r\n"
                    + "Content-Length: " + body.length + "\r\n\r\n").getBytes(UTF_8));
            out.write(body);
            socket.getInputStream().readAllBytes();
        }
    }

    private static Socket ask(String host, int port, String path) throws IOException {
        Socket socket = new Socket();
        socket.setReceiveBufferSize(4_096);
        socket.connect(new InetSocketAddress(host, port), 2_000);
        socket.setSoTimeout(1);
        socket.getOutputStream().write(("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nAccept: "
                + (path.startsWith("/?") ? "text/html" : "*/*") + "\r\n\r\n").getBytes(UTF_8));
        return socket;
    }

    private static void readOne(Socket socket) {
        try {
            socket.getInputStream().read();
        } catch (IOException e) { /* nothing there, or it was closed: as it should be */ }
    }
}
