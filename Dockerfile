# syntax is left to the engine's own BuildKit: a `# syntax=` line would need a registry.
# Build in the JBang image, run in a lean one: what runs needs no network, no compiler and no JBang. JBang has no image
# with Java 25, so a JDK 25 is put beside its own.
ARG JBANG_IMAGE=jbangdev/jbang:0.132.1-java-21
ARG JDK_IMAGE=eclipse-temurin:25-jdk
ARG RUNTIME_IMAGE=busybox:1.37-glibc

FROM ${JDK_IMAGE} AS jdk

# --- The //DEPS lines alone. This stage runs for every change of the source, but what it gives to the next one
#     stays the same, byte for byte, until a dependency changes: so a changed line of code downloads nothing.
FROM ${JBANG_IMAGE} AS deps
WORKDIR /deps
COPY Service.java .
# For the image only what stands above the line on the embedded servers; for the compiler and the training everything,
# but PostgreSQL's programs only for this processor.
RUN sed '/^\/\/ Only for/q' Service.java | grep '^//\(JAVA\|DEPS\)' > runtime.java \
 && case $(uname -m) in aarch64) system=linux-arm64v8 ;; *) system=linux-amd64 ;; esac \
 && grep '^//\(JAVA\|DEPS\)' Service.java | grep -v "postgres-binaries-[^:]*" > training.java \
 && grep "postgres-binaries-$system:" Service.java >> training.java \
 && for list in runtime training; do echo "class $list {}" >> $list.java; done && rm Service.java

FROM ${JBANG_IMAGE} AS build
WORKDIR /opt/threefold
COPY --from=jdk /opt/java/openjdk /opt/jdk
# --- A Java runtime of the few modules the service uses.
RUN /opt/jdk/bin/jlink --output java --no-header-files --no-man-pages --strip-java-debug-attributes --compress zip-6 \
          --exclude-files '**.debuginfo' \
# (crypto.ec: without elliptic curves there is no TLS to PostgreSQL)
          --add-modules java.logging,java.management,java.naming,java.sql,jdk.crypto.ec,jdk.management,jdk.unsupported \
# What it is linked against beyond what busybox:glibc holds comes along: libz and libstdc++ for Debian's JDK,
# the empty libdl and librt that an older C library wanted for Temurin's.
 && ldd java/bin/java java/lib/*.so java/lib/server/*.so | awk '/=> \// { print $3 }' | sort -u \
    | grep -vE "$PWD|/(libc|libm|libpthread|libresolv)\.so" | xargs -r cp -Lt java/lib
# --- Dependencies, before the source.
COPY --from=deps /deps /deps
RUN for list in runtime training; do \
      mkdir /deps/$list \
      && jbang info classpath /deps/$list.java | tr ':' '\n' | grep -v "/$list.jar$" \
       | xargs cp -t /deps/$list || exit; \
    done && mv /deps/runtime lib
# --- The service.
COPY Service.java init.sql openapi.json page/ /source/
RUN mkdir /classes && cd /source \
 && /opt/jdk/bin/javac -Xlint:-options -proc:none -d /classes -cp "/deps/training/*" Service.java \
 && rm Service.java && /opt/jdk/bin/jar --create --file /opt/threefold/service.jar -C /classes . -C /source .
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
# Instances that take turns on few processors find their caches cold each time: with six on two, a request takes 5 to
# 11 % less processor time of an instance.
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
-Xlog:disable
-Xlog:all=error:stderr
# Why the trained cache (below) does not fit, if it does not: the service then starts without it.
-Xlog:aot*=warning:stderr
# XNIO, below Undertow, makes itself known to JMX, which nobody asks here: to start JMX's server takes a sixth of our
# start. This is no class that could build that server, so XNIO goes without; what /metrics tells of the JVM needs none.
-Djavax.management.builder.initial=java.lang.Object
EOF_OPTIONS
RUN echo "-cp /opt/threefold/service.jar:$(printf '%s\n' /opt/threefold/lib/*.jar | paste -sd:)" >> java.options

# --- The training: the service, under the options and the class path that it will have, answers all kinds of requests
#     for some seconds. At its end Java writes down which classes it used, how they are linked, and which methods were
#     called how; an instance of the image then starts with that. PostgreSQL does not run as root.
FROM build AS training
COPY scripts/Train.java /training/
RUN /opt/jdk/bin/javac -proc:none -d /training -cp "/deps/training/*" /training/Train.java && chown nobody .
USER nobody
RUN /opt/jdk/bin/java -XX:+UseSerialGC -cp "/training:/deps/training/*" Train \
    java/bin/java @java.options -XX:AOTCacheOutput=service.aot Service && ls -l

FROM ${RUNTIME_IMAGE}
WORKDIR /opt/threefold
# All in one layer: the cache fits files of one size and time, and a layer kept by the builder may have other times.
COPY --from=training --chown=0:0 /opt/threefold .
ENV LD_LIBRARY_PATH=/opt/threefold/java/lib \
    MALLOC_ARENA_MAX=2
USER 10001:10001
# The build ends here if the cache does not fit; an instance would start without it, and say so.
RUN java/bin/java @java.options -XX:AOTMode=on -XX:AOTCache=/opt/threefold/service.aot -version
EXPOSE 9999
# Process 1 is java itself, so that SIGTERM reaches it.
ENTRYPOINT ["/opt/threefold/java/bin/java", "@/opt/threefold/java.options", \
            "-XX:AOTCache=/opt/threefold/service.aot", "Service"]
