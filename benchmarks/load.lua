-- One operation for wrk: `wrk -s load.lua URL -- OPERATION TOKENS FIRST_ID TASKS_PER_USER`.
-- TOKENS is a file with one token per line. User n owns the tasks FIRST_ID + n, + n + USERS, …
local operation, tokens, first, per_user
local thread_number = 0
local step = 0

function setup(thread)
  thread:set("number", thread_number)
  thread_number = thread_number + 1
end

function init(arguments)
  operation, first, per_user = arguments[1], tonumber(arguments[3]), tonumber(arguments[4])
  tokens = {}
  for token in io.lines(arguments[2]) do tokens[#tokens + 1] = "Bearer " .. token end
  math.randomseed(number + 1)
end

-- Each thread uses its own tasks, one user after another. It never requests a deleted task again.
local function next_task()
  local user = step % #tokens
  local round = math.floor(step / #tokens)
  step = step + 1
  local own = (round * 2 + number) % per_user
  return user, first + user + own * #tokens
end

local json = '{"title": "Buy groceries %d", "description": "Milk and bread", "priority": "high"}'

function request()
  local user, task = next_task()
  local headers = { ["Authorization"] = tokens[user + 1] }
  local path = "/api/tasks/" .. task
  if operation == "list" then return wrk.format("GET", "/api/tasks", headers) end
  if operation == "get" then return wrk.format("GET", path, headers) end
  if operation == "delete" then return wrk.format("DELETE", path, headers) end
  if operation == "complete" then return wrk.format("PATCH", path .. "/complete", headers) end
  headers["Content-Type"] = "application/json"
  local body = json:format(math.random(1000000))
  if operation == "create" then return wrk.format("POST", "/api/tasks", headers, body) end
  return wrk.format("PUT", path, headers, body)
end

function done(summary, latency, _)
  io.write(string.format(
    "RESULT %d %d %d %d %d\n", summary.requests, summary.duration, summary.errors.status,
    latency:percentile(50), latency:percentile(99)))
end
