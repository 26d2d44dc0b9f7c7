// What llama.cpp, through the npm package node-llama-cpp, makes of a GGUF file: the tokens of texts,
// greedy tokens behind a prompt, and the probabilities at every position of a given text.
//
//   node llama.mjs FOLDER_OF_NODE_MODULES CASES.json     answers: CASES.json.out, a line each

import fs from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [folder, file] = process.argv.slice(2);
const resolve = createRequire(path.join(path.resolve(folder), "x.js")).resolve;
const {getLlama} = await import(pathToFileURL(resolve("node-llama-cpp")));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
for (const one of JSON.parse(fs.readFileSync(file))) {
  const model = await llama.loadModel({modelPath: one.file});
  const context = await model.createContext({
    contextSize: 128, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
  });
  const sequence = context.getSequence();
  const greedy = [];
  const tokens = sequence.evaluate(one.prompt, {temperature: 0, yieldEogToken: true});
  for await (const token of tokens) {
    greedy.push(token);
    if (greedy.length === one.count) break;
  }
  await sequence.clearHistory();
  const read = await sequence.controlledEvaluate(
    one.text.map((token) => [token, {generateNext: {probabilities: true}}])
  );
  const texts = one.texts.map((text) => model.tokenize(text, true));
  const probabilities = read.map((at) => [...at.next.probabilities]);
  fs.appendFileSync(`${file}.out`, JSON.stringify({greedy, probabilities, texts}) + "\n");
  await context.dispose();
  await model.dispose();
}
process.exit(0);
