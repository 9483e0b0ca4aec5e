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
# --- The one piece of a locale that makes Java read its environment as UTF-8; busybox has none.
RUN install -D /usr/lib/locale/C.utf8/LC_CTYPE locale/C.utf8/LC_CTYPE
# --- Dependencies, before the source.
COPY --from=deps /deps /deps
COPY jbang /deps/bin/
# The launcher tells JBang of the caller's proxy. One at a loopback address is the caller's machine alone: nothing in
# here reaches it.
RUN https_proxy=${https_proxy-} http_proxy=${http_proxy-} \
 && case ,${https_proxy#*//},${http_proxy#*//} in \
      *,localhost* | *,127.* | *,\[::1\]*) unset https_proxy http_proxy HTTPS_PROXY HTTP_PROXY ;; \
    esac \
 && for list in runtime training; do \
      mkdir /deps/$list \
      && /deps/bin/jbang info classpath /deps/$list.java | tr ':' '\n' | grep -v "/$list.jar$" \
       | xargs cp -t /deps/$list || exit; \
    done && mv /deps/runtime lib
# --- The service.
COPY Service.java init.sql openapi.json page/ /source/
RUN mkdir /classes && cd /source \
 && /opt/jdk/bin/javac -Xlint:-options -proc:none -d /classes -cp "/deps/training/*" Service.java \
 && rm Service.java && /opt/jdk/bin/jar --create --file /opt/threefold/service.jar -C /classes . -C /source .
COPY <<'EOF_OPTIONS' java.options
# The container may have 192 MB (docker-compose.yml). The most that each part of it may take: the heap (32 MB do for
# ordinary load, 64 for 1,024 waiting requests of the largest size); the buffers of 16 KB that are being read into or
# written from; the descriptions of classes; compiled code.
-Xmx64m
-XX:MaxDirectMemorySize=24m
-XX:MaxMetaspaceSize=48m
-XX:ReservedCodeCacheSize=24m
# One small heap: the collector without threads and tables of its own. In so small a container Java takes it anyway; the
# training below, which has all of the machine, has to take the same.
-XX:+UseSerialGC
# What the compilers needed is not needed once they are done, and the C library would keep it: after 20 s of load 86 to
# 93 MB are resident instead of 109 to 111.
-XX:TrimNativeHeapInterval=10000
# Java compiles what is called often, first quickly, then thoroughly, which takes some ten times as long; while it
# starts, that is taken from the requests. So the second step waits for ten times as many calls as usual. In the first
# second 2.1 times as many visits are answered, 2.4 times as many pages, 1.3 times as many posts (docs/design.md).
-XX:Tier4InvocationThreshold=50000
-XX:Tier4MinInvocationThreshold=6000
-XX:Tier4CompileThreshold=150000
-XX:Tier4BackEdgeThreshold=400000
# Out of memory is stuck, and Docker restarts what exits, not what is stuck.
-XX:+ExitOnOutOfMemoryError
-Xlog:disable
-Xlog:all=error:stderr
# Why the trained cache (below) does not fit, if it does not: the service then starts without it.
-Xlog:aot*=warning:stderr
# XNIO, below Undertow, makes itself known to JMX, which nobody asks here. This is no class that could build JMX's
# server, so XNIO goes without, and what /metrics tells of the JVM needs none: 0.36 s to start, not 0.39, and 6 MB less.
-Djavax.management.builder.initial=java.lang.Object
EOF_OPTIONS
RUN echo "-cp /opt/threefold/service.jar:$(printf '%s\n' /opt/threefold/lib/*.jar | paste -sd:)" >> java.options

# --- The training: the service, under the options and the class path that it will have, answers all kinds of requests.
#     At its end Java writes down which classes it used, ready to be used again; an instance of the image starts with
#     that. (It could also write down how often each method was called. With that, an instance begins to compile all of
#     them thoroughly as it starts, and is slower in its first seconds.) PostgreSQL does not run as root.
FROM build AS training
COPY image/Train.java /training/
RUN /opt/jdk/bin/javac -proc:none -d /training -cp "service.jar:/deps/training/*" /training/Train.java && chown nobody .
USER nobody
RUN /opt/jdk/bin/java -XX:+UseSerialGC -cp "/training:service.jar:/deps/training/*" Train \
    java/bin/java @java.options -XX:+UnlockDiagnosticVMOptions -XX:-AOTRecordTraining \
      -XX:AOTCacheOutput=service.aot Service && ls -l

FROM ${RUNTIME_IMAGE}
WORKDIR /opt/threefold
# All in one layer: the cache fits files of one size and time, and a layer kept by the builder may have other times.
COPY --from=training --chown=0:0 /opt/threefold .
ENV LC_CTYPE=C.UTF-8 \
    LOCPATH=/opt/threefold/locale \
    LD_LIBRARY_PATH=/opt/threefold/java/lib \
    MALLOC_ARENA_MAX=2
USER 10001:10001
# The build ends here if the cache does not fit, since an instance would start without it, and say so; or if the locale
# does not, since a password in any other script than ASCII would be read as another one.
RUN said=$(java/bin/java @java.options -XX:AOTMode=on -XX:AOTCache=/opt/threefold/service.aot \
      -XshowSettings:properties -version 2>&1) && echo "$said" | grep 'sun.jnu.encoding = UTF-8' \
 || { echo "$said"; exit 1; }
EXPOSE 9999
# Process 1 is java itself, so that SIGTERM reaches it.
ENTRYPOINT ["/opt/threefold/java/bin/java", "@/opt/threefold/java.options", \
            "-XX:AOTCache=/opt/threefold/service.aot", "Service"]
