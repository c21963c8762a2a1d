// The `openai` package of npm: chat, streaming and its abort, tools, parsed output, completions, responses, models, errors.
import assert from "node:assert/strict";
import OpenAI, { NotFoundError } from "openai";
import { readFile } from "node:fs/promises";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const asked = { model, temperature: 0, messages: [{ role: "user", content: "What is 347 + 285?" }] };
const ANSWER = "347 + 285 = 632";

async function chat() {
  const answer = await client.chat.completions.create(asked);
  assert.equal(answer.choices[0].message.content, ANSWER);
  assert.equal(answer.choices[0].message.refusal, null);
  assert.ok(answer.choices[0].message.reasoning_content.length > 0);
}

async function stream() {
  const chunks = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  let text = "", usage = null;
  for await (const chunk of chunks) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, ANSWER);
  assert.ok(usage.completion_tokens > 10);
}

async function abort() {
  const chunks = await client.chat.completions.create({ ...asked, max_tokens: 2000, ignore_eos: true, stream: true });
  for await (const chunk of chunks) {
    assert.ok(chunk.choices);
    break;
  }
  chunks.controller.abort();
}

async function runner_with_tools() {
  const calls = [];
  const answer = await client.chat.completions
    .runTools({
      ...asked,
      messages: [{ role: "user", content: "What is the weather in Paris?" }],
      tools: [{
        type: "function",
        function: {
          name: "get_weather",
          description: "Returns the current weather of a city.",
          parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
          parse: JSON.parse,
          function: ({ city }) => { calls.push(city); return `sunny in ${city}`; },
        },
      }],
    })
    .finalContent();
  assert.deepEqual(calls, ["Paris"]);
  assert.ok(answer.length > 0);
}

async function parsed_output() {
  const schema = {
    type: "object", properties: { name: { type: "string" }, size: { type: "integer" } },
    required: ["name", "size"], additionalProperties: false,
  };
  const answer = await client.chat.completions.parse({
    ...asked, messages: [{ role: "user", content: "Extract: the city of Berlin has size 89." }],
    response_format: { type: "json_schema", json_schema: { name: "city", schema, strict: true } },
  });
  assert.equal(JSON.parse(answer.choices[0].message.content).name, "Berlin");
}

async function completion() {
  const answer = await client.completions.create({ model, prompt: "1, 2, 3,", max_tokens: 8, temperature: 0 });
  assert.equal(answer.choices[0].text, " 4, 5, 6");
}

async function responses() {
  const answer = await client.responses.create({ model, input: "What is 347 + 285?", temperature: 0 });
  assert.equal(answer.output_text, ANSWER);
  let text = "";
  const events = await client.responses.create({ model, input: "What is 347 + 285?", temperature: 0, stream: true });
  for await (const event of events) if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal(text, ANSWER);
}

async function models() {
  const listed = [];
  for await (const entry of client.models.list()) listed.push(entry.id);
  assert.deepEqual(listed, [model]);
}

async function unknown_model() {
  await assert.rejects(client.chat.completions.create({ ...asked, model: "gpt-unknown" }), NotFoundError);
}

const { version } = JSON.parse(await readFile("node_modules/openai/package.json", "utf8"));
const flows = [chat, stream, abort, runner_with_tools, parsed_output, completion, responses, models, unknown_model];
for (const flow of flows) await flow();
console.log(JSON.stringify({ client: "openai (npm)", version, flows: flows.map((flow) => flow.name) }));
