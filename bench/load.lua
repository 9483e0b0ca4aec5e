-- The requests and the output of wrk: wrk … -s load.lua URL -- get|addresses|post|mixed|overload [TEXT [RATE]]
-- Prints one line: good responses, microseconds, p50 and p99 in microseconds, failed requests, and how they failed; for
-- `overload`: 201s, 503s with Retry-After, other responses, broken connections.
local ffi = require("ffi")
ffi.cdef "typedef struct { long seconds, micros; } timeval; int gettimeofday(timeval *, void *);"

local threads = {}
function setup(thread) table.insert(threads, thread) end

-- RATE a second from this thread at random times (a Poisson process): each response frees its connection for the next
-- time of the list.
local function pace(rate)
  local now, last = ffi.new("timeval")
  math.randomseed(tonumber(tostring({}):match("0x(%x+)"), 16) % 2^31)
  function delay()
    ffi.C.gettimeofday(now, nil)
    local millis = tonumber(now.seconds) * 1000 + tonumber(now.micros) / 1000
    last = (last or millis) - 1000 / rate * math.log(1 - math.random())
    return math.max(0, math.floor(last - millis + 0.5))
  end
end

-- Nine requests for the URL, then a POST.
function mix(text)
  local get, sent = wrk.format("GET"), 0
  local post = wrk.format("POST", "/api/messages", {["Content-Type"] = "application/json"},
    '{"author":"bench","body":"' .. text .. '"}')
  function request()
    sent = sent + 1
    return sent % 10 == 0 and post or get
  end
end

-- Each request claims the next of 250 client addresses, which are in as many networks (ip_hash ignores the last byte).
function addresses()
  local requests, sent = {}, 0
  for i = 1, 250 do requests[i] = wrk.format("GET", nil, {["X-Forwarded-For"] = "198.18." .. i .. ".1"}) end
  function request()
    sent = sent % 250 + 1
    return requests[sent]
  end
end

stored, refused, other = 0, 0, 0
local function count(status, headers)
  if status == 201 then stored = stored + 1
  elseif status == 503 and headers["Retry-After"] then refused = refused + 1
  else other = other + 1 end
end

function init(args)
  overload = args[1] == "overload"
  if args[1] == "mixed" then mix(args[2]) elseif args[1] == "addresses" then addresses() elseif args[1] ~= "get" then
    wrk.method = "POST"
    wrk.headers["Content-Type"] = "application/json"
    wrk.body = '{"author":"bench","body":"' .. args[2] .. '"}'
  end
  if args[3] then pace(tonumber(args[3])) end
  if overload then response = count end
end

function done(summary, latency)
  local broken = summary.errors.connect + summary.errors.read + summary.errors.write
  if threads[1]:get("overload") then
    local sum = {stored = 0, refused = 0, other = 0}
    for _, thread in ipairs(threads) do
      for what in pairs(sum) do sum[what] = sum[what] + thread:get(what) end
    end
    print("wrk", sum.stored, sum.refused, sum.other, broken)
  else
    local late, refused = summary.errors.timeout, summary.errors.status
    print("wrk", summary.requests - refused, summary.duration, latency:percentile(50), latency:percentile(99),
      broken + late + refused, string.format("%d broken, %d late, %d with an error", broken, late, refused))
  end
end
