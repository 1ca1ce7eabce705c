// Every route and stream of a server, by OpenAI's client for node. What it got is JSON on standard output.
const { OpenAI } = require("openai");

const [base, key, model, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL: base + "/v1", apiKey: key, maxRetries: 0 });
const chat = { model, messages: [{ role: "user", content: prompt }] };

async function refusal(work) {
  try {
    await work();
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
  return null;
}

async function main() {
  const found = {};
  found.models = (await client.models.list()).data.map((one) => one.id);
  found.model = (await client.models.retrieve(model)).id;

  const completion = await client.completions.create({ model, prompt, logprobs: 0 });
  found.completion = completion.choices[0].text;
  found.tokens = completion.choices[0].logprobs.tokens.join("");
  found.usage = completion.usage;
  const several = await client.completions.create({ model, prompt: [prompt, prompt], n: 2, temperature: 1, seed: 3, max_tokens: 4 });
  found.indices = several.choices.map((choice) => choice.index);

  found.completionStream = "";
  found.completionUsage = null;
  for await (const chunk of await client.completions.create({ model, prompt, stream: true, stream_options: { include_usage: true } })) {
    for (const choice of chunk.choices) found.completionStream += choice.text;
    found.completionUsage = chunk.usage ?? found.completionUsage;
  }

  found.chat = (await client.chat.completions.create({ ...chat, logprobs: true })).choices[0].message;
  found.chatStream = "";
  found.reasons = [];
  for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
    found.chatStream += chunk.choices[0].delta.content ?? "";
    if (chunk.choices[0].finish_reason) found.reasons.push(chunk.choices[0].finish_reason);
  }
  // The helper gathers the chunks by itself.
  const runner = client.chat.completions.stream(chat);
  found.chatGathered = (await runner.finalChatCompletion()).choices[0].message.content;

  const stopped = await client.chat.completions.create({ ...chat, min_new_tokens: 60, max_tokens: 60, stream: true });
  for await (const chunk of stopped) {
    if (chunk.choices[0].delta.content) break; // closes the connection
  }
  found.afterStop = (await client.completions.create({ model, prompt, max_tokens: 2 })).usage.completion_tokens;

  found.score = await client.post("/score", { body: { model, prompt, responses: [completion.choices[0].text.trim(), "x"] } });

  found.noModel = await refusal(() => client.completions.create({ model: "none", prompt }));
  found.badField = await refusal(() => client.completions.create({ model, prompt, best_of: 2 }));
  const stranger = new OpenAI({ baseURL: base + "/v1", apiKey: "wrong", maxRetries: 0 });
  found.noKey = await refusal(() => stranger.models.list());
  console.log(JSON.stringify(found));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
