# What people type. `make` alone lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# The builder of before knows no here-documents.
export DOCKER_BUILDKIT := 1

# What a caller has exported under these names is not meant for make: WSL exports NAME, csh HOST, the computer's.
$(foreach name,NAME HOST ID N FILE CASE WHAT,$(if $(findstring environment,$(origin $(name))),$(eval $(name) :=)))

# Said when a target fails for want of something; `make doctor` finds out what.
hint = { code=$$?; echo "That did not work; \`make doctor\` says what may be missing." >&2; exit $$code; }

# A prompt on a terminal; without one, commands by a pipe: echo 'SELECT 1' | make psql
no_tty = $$([ -t 0 ] || echo -T)

# What `make monitor` started is part of it.
all_of_it = docker compose --profile monitor --profile grafana

.PHONY: help
help:
	@awk 'BEGIN { FS = ":.*##" } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	     /^[a-z-]+:.*##/ { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ The stack

.PHONY: up
up: ## builds, starts, waits until all is healthy, prints the address
	@. scripts/lib.sh && own_stack && claim_data && check_nginx || $(hint)
	@docker compose up --detach --build --wait || { scripts/why >&2; false; } || $(hint)
	@. scripts/lib.sh && reload_nginx && say "Threefold answers at $$URL"

.PHONY: build
build: ## builds the image
	@. scripts/lib.sh && own_stack && docker compose build || $(hint)

.PHONY: exercise
exercise: ## sends visits and messages for a while and shows live who answered (SECONDS_LONG=20)
	@scripts/exercise

.PHONY: ps
ps: ## state of the containers
	@docker compose ps --all

.PHONY: logs
logs: ## what the containers say, as they say it
	@docker compose logs --follow --tail 50

.PHONY: trace
trace: ## follows one request through all logs: make trace ID=… (the X-Request-Id of an answer)
	@scripts/trace "$(ID)"

.PHONY: restart
restart: ## restarts every container
	@. scripts/lib.sh && own_stack && check_nginx && docker compose restart && wait_ready

.PHONY: rolling
rolling: build ## builds, and replaces the web instances one at a time, without a failed request
	@scripts/rolling

.PHONY: scale
scale: ## N web instances in all, 3 to 20, without a failed request: make scale N=6
	@scripts/scale "$(N)"

.PHONY: monitor
monitor: ## Prometheus beside it, with rules and alerts, at port 9090 (GRAFANA=1: Grafana too, at port 3000)
	@scripts/monitor || $(hint)

.PHONY: down
down: ## stops it; the data stay
	@. scripts/lib.sh && own_stack && $(all_of_it) down --remove-orphans

.PHONY: clean
clean: ## stops it and removes data and the image, after asking
	@. scripts/lib.sh && own_stack
	@name=$$(docker compose config | sed -n 's/^name: //p'); \
	  read -rp "This deletes all messages and counters of the stack \"$$name\", and the image. Type yes: " answer || :; \
	  [ "$$answer" = yes ] || { echo "Nothing was removed."; exit 1; }
	@$(all_of_it) down --remove-orphans --volumes
	@docker image rm --force "$$(docker compose config web1 | sed -n 's/^    image: //p' | tail -n 1)" >/dev/null

##@ Proof

.PHONY: test
test: ## the service's own tests, with real PostgreSQL and Redis, no Docker needed
	@./jbang tests/ServiceTest.java $(NAME) && ./jbang tests/OpenApiTest.java

.PHONY: lint
lint: ## each language by its own tool (scripts/lint shell html: only these)
	@scripts/lint

.PHONY: test-lb
test-lb: ## shows and checks that requests spread over the instances
	@tests/load-balancing

.PHONY: test-persist
test-persist: ## restarts, kills and recreates all containers; checks that every message and count is still there
	@tests/persistence

.PHONY: test-failover
test-failover: ## kills, stops, hangs parts under load; checks that nothing is lost, doubled or refused (CASE=…)
	@tests/failover $(CASE)

.PHONY: test-environments
test-environments: ## on machines unlike ours: other shells, proxies, settings, users, old volumes (CASE=…)
	@tests/environments $(CASE)

.PHONY: test-upgrade
test-upgrade: ## from an earlier version to this one in place, under load: nothing is lost, doubled or refused
	@tests/upgrade

.PHONY: test-browser
test-browser: ## opens the page in a real browser and uses it
	@tests/browser/run

.PHONY: test-monitor
test-monitor: ## each target, rule and query of the dashboard has an answer; kills PostgreSQL and sees the alert
	@tests/monitor

.PHONY: pictures
pictures: ## makes the pictures of README.md anew, on an empty stack of its own
	@scripts/pictures

.PHONY: test-docs
test-docs: ## runs the commands of README.md and docs/
	@tests/docs

.PHONY: bench
bench: ## measures against what the machine can do (QUICK=1: under two minutes)
	@tests/bench/run

.PHONY: bench-peers
bench-peers: ## measures the same job in other frameworks beside this one (QUICK=1: to see that it works)
	@tests/bench/peers/run

##@ Three machines (docs/cluster.md)

.PHONY: cluster-up
cluster-up: ## three machines inside this one, and the stack on a Swarm of them (Linux, as root)
	@cluster/up

.PHONY: cluster-down
cluster-down: ## …and all of it is gone, the data too
	@cluster/down

.PHONY: test-cluster
test-cluster: ## takes these machines away under load; checks that nothing is lost, doubled or refused (CASE=…)
	@tests/cluster $(CASE)

.PHONY: cluster-bench
cluster-bench: ## six instances against three, and what the copies cost, as ratios of one run
	@cluster/bench

.PHONY: test-kubernetes
test-kubernetes: ## builds cluster/kubernetes and checks each field against the schema of the API
	@base=cluster/kubernetes; if command -v kubectl >/dev/null; then kubectl kustomize $$base; \
	  else kustomize build $$base; fi | ./jbang tests/Kubernetes.java

##@ Without Docker, and data

.PHONY: run
run: ## one instance on this machine, no Docker: jbang Service.java
	@./jbang Service.java

.PHONY: psql
psql: ## a prompt at the database
	@docker compose exec $(no_tty) postgres psql

.PHONY: redis-cli
redis-cli: ## a prompt at Redis
	@docker compose exec $(no_tty) redis redis-cli

.PHONY: backup
backup: ## messages and counters into one archive: make backup FILE=threefold.tar.gz
	@scripts/backup save "$(FILE)"

.PHONY: restore
restore: ## …and back, after asking: make restore FILE=threefold.tar.gz
	@scripts/backup load "$(FILE)"

##@ Trouble

.PHONY: doctor
doctor: ## what is present, what is missing, and how to get it
	@scripts/doctor

.PHONY: offline-images
offline-images: ## builds stand-ins for the official images, where no registry can be reached (WHAT=monitor: its)
	@scripts/offline-images/build $(WHAT)
