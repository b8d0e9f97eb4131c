// Drives a server with the package `openai` of npm: node openai_client.mjs ADDRESS MODEL
import OpenAI, { BadRequestError } from "openai";

const [address, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "the cat" }];
const rules = { model, messages, max_tokens: 5, n: 2, seed: 3, temperature: 1.2 };
const found = {};

const whole = await client.chat.completions.create({ ...rules, logprobs: true, top_logprobs: 2 });
found.whole = whole.choices.map((choice) => choice.message.content);
found.tops = whole.choices[0].logprobs.content.map((each) => each.top_logprobs.length);
found.streamed = ["", ""];
for await (const piece of await client.chat.completions.create({ ...rules, stream: true })) {
  for (const choice of piece.choices) found.streamed[choice.index] += choice.delta.content ?? "";
}
const completion = await client.completions.create({ model, prompt: "the cat", max_tokens: 5 });
found.completion = completion.choices[0].text;
found.models = (await client.models.list()).data.map((each) => each.id);
try {
  await client.chat.completions.create({ model, messages, max_tokens: 10 ** 9 });
} catch (error) {
  found.error = [error instanceof BadRequestError, error.param, error.message];
}
console.log(JSON.stringify(found));
