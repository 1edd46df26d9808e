// OpenAI's own Node client against a mesh: argv is the module's folder, the base URL, the model.
import { createRequire } from "node:module";

const [folder, baseURL, model] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/`)("openai").default ?? createRequire(`${folder}/`)("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name three colours." }];
const found = {};

const whole = await client.chat.completions.create({
  model, messages, max_tokens: 12, logprobs: true, top_logprobs: 2,
});
found.whole = whole.choices[0].message.content;
found.numLogprobs = whole.choices[0].logprobs.content.length;

let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  model, messages, max_tokens: 12, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
found.streamed = streamed;
found.usage = usage;

const several = await client.completions.create({
  model, prompt: ["One", "Two"], n: 2, max_tokens: 3,
});
found.several = several.choices.length;

const tools = [{ type: "function", function: { name: "f", parameters: { type: "object" } } }];
const runner = await client.chat.completions.create({
  model, messages, tools, tool_choice: "none", max_tokens: 3,
});
found.finish = runner.choices[0].finish_reason;

for (const [name, request] of [
  ["bad", { model, messages, temperature: 9 }],
  ["unknown", { model: "nobody", messages }],
]) {
  try {
    await client.chat.completions.create(request);
  } catch (error) {
    found[name] = { kind: error.constructor.name, status: error.status, param: error.param };
  }
}
found.models = [];
for await (const listed of client.models.list()) found.models.push(listed.id);
console.log(JSON.stringify(found));
