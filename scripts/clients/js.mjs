// Clients in JavaScript: node js.mjs URL NAME. Prints a line of JSON for each trial, as trial.py does.
const MODEL = 'smollm2';
const QUESTION = 'What is the weather in Paris in two days?';
const SCHEMA = {
  type: 'object', required: ['city', 'days'], additionalProperties: false,
  properties: { city: { type: 'string', enum: ['Paris', 'Rome'] }, days: { type: 'integer', maximum: 14 } },
};
const TOOL = { type: 'function', function: { name: 'get_weather', parameters: SCHEMA } };
const [url, name] = process.argv.slice(2);
const v1 = `${url}/v1`;
const asked = { model: MODEL, max_tokens: 64, messages: [{ role: 'user', content: QUESTION }] };

function check(truth, told) {
  if (!truth) throw new Error(`not so: ${JSON.stringify(told)}`);
}
const checkWeather = (given) => check(['Paris', 'Rome'].includes(given.city) && Number.isInteger(given.days), given);

const CLIENTS = {
  async openai() {
    const { default: OpenAI } = await import('openai');
    const client = new OpenAI({ baseURL: v1, apiKey: 'none', maxRetries: 0 });
    return {
      'chat, streamed': async () => {
        let text = '';
        for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
          text += chunk.choices[0]?.delta?.content ?? '';
        }
        check(text);
      },
      tools: async () => {
        const answer = await client.chat.completions.create({ ...asked, tools: [TOOL], tool_choice: 'required' });
        checkWeather(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments));
      },
      'tools, streamed': async () => {
        const stream = client.chat.completions.stream({ ...asked, tools: [TOOL], tool_choice: 'required' });
        const answer = await stream.finalChatCompletion();
        checkWeather(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments));
      },
      'responses, streamed': async () => {
        const stream = client.responses.stream({ model: MODEL, input: 'Hi', max_output_tokens: 32 });
        check((await stream.finalResponse()).output_text);
      },
    };
  },
  async anthropic() {
    const { default: Anthropic } = await import('@anthropic-ai/sdk');
    const client = new Anthropic({ baseURL: url, apiKey: 'none', maxRetries: 0 });
    return {
      'messages, streamed': async () => check((await client.messages.stream(asked).finalMessage()).content[0].text),
      tools: async () => {
        const tools = [{ name: 'get_weather', input_schema: SCHEMA }];
        const answer = await client.messages.create({ ...asked, tools, tool_choice: { type: 'any' } });
        checkWeather(answer.content.find((block) => block.type === 'tool_use').input);
      },
    };
  },
  async huggingface() {
    const { InferenceClient } = await import('@huggingface/inference');
    const client = new InferenceClient('none').endpoint(url);
    return {
      chat: async () => check((await client.chatCompletion(asked)).choices[0].message.content),
      'text generation': async () => {
        const given = { inputs: 'A colour is', parameters: { max_new_tokens: 8 } };
        check((await client.textGeneration(given)).generated_text);
      },
      'text generation, streamed': async () => {
        let text = '';
        const given = { inputs: 'A colour is', parameters: { max_new_tokens: 8 } };
        // Pieces are TGI's, or OpenAI's: the client's releases differ.
        for await (const piece of client.textGenerationStream(given)) text += (piece.token ?? piece.choices[0]).text;
        check(text);
      },
    };
  },
  async vercel() {
    const { createOpenAI } = await import('@ai-sdk/openai');
    const { generateObject, generateText, jsonSchema, streamText, tool } = await import('ai');
    const openai = createOpenAI({ baseURL: v1, apiKey: 'none' });
    const given = { prompt: QUESTION, maxOutputTokens: 64, maxRetries: 0 };
    const weather = tool({ description: 'The weather', inputSchema: jsonSchema(SCHEMA) });
    return {
      'text, by responses (default)': async () => check((await generateText({ model: openai(MODEL), ...given })).text),
      'a chat that goes on, by responses (default)': async () => {
        const messages = [{ role: 'user', content: QUESTION }];
        const { prompt, ...rest } = given;
        const first = await generateText({ model: openai(MODEL), messages, ...rest });
        messages.push(...first.response.messages, { role: 'user', content: 'And in Rome?' }); // by reference
        check((await generateText({ model: openai(MODEL), messages, ...rest })).text);
      },
      'text, by chat, streamed': async () => {
        let text = '';
        for await (const piece of streamText({ model: openai.chat(MODEL), ...given }).textStream) text += piece;
        check(text);
      },
      'an object': async () => {
        checkWeather((await generateObject({ model: openai(MODEL), schema: jsonSchema(SCHEMA), ...given })).object);
      },
      tools: async () => {
        const more = { tools: { get_weather: weather }, toolChoice: 'required' };
        for (const model of [openai(MODEL), openai.chat(MODEL)]) {
          checkWeather((await generateText({ model, ...given, ...more })).toolCalls[0].input);
        }
      },
    };
  },
  async langchain() {
    const { ChatOpenAI } = await import('@langchain/openai');
    const fields = { model: MODEL, apiKey: 'none', maxTokens: 64, maxRetries: 0, configuration: { baseURL: v1 } };
    const model = new ChatOpenAI(fields);
    return {
      chat: async () => check((await model.invoke('Hi')).content),
      tools: async () => {
        const answer = await model.bindTools([TOOL], { tool_choice: 'required' }).invoke(QUESTION);
        checkWeather(answer.tool_calls[0].args);
      },
      'an object (default)': async () => {
        checkWeather(await model.withStructuredOutput(SCHEMA, { name: 'weather' }).invoke(QUESTION));
      },
      responses: async () => check((await new ChatOpenAI({ ...fields, useResponsesApi: true }).invoke('Hi')).text),
    };
  },
};

for (const [tried, trial] of Object.entries(await CLIENTS[name]())) {
  let wrong = null;
  try {
    await trial();
  } catch (error) {
    console.error(error);
    wrong = `${error.name}: ${error.message}`;
  }
  console.log(JSON.stringify({ tried, wrong }));
}
