// Greedy generation by llama.cpp, through the npm package node-llama-cpp, as a worker of
// `benchmarks.duel`: one line of facts, then a line for each word it is sent.
//
//   node llama.mjs FOLDER_OF_NODE_MODULES MODEL.gguf PROMPTS.json NEW

import fs from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, file, promptsFile, count] = process.argv.slice(2);
const resolve = createRequire(path.join(path.resolve(folder), "x.js")).resolve;
const {getLlama} = await import(pathToFileURL(resolve("node-llama-cpp")));
const prompts = JSON.parse(fs.readFileSync(promptsFile));
const fresh = Number(count);
const threads = Number(process.env.LLAMA_THREADS);

const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: threads});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({
  contextSize: prompts[0].length + fresh + 8, sequences: prompts.length, threads, batchSize: 512,
});
const sequences = prompts.map(() => context.getSequence());

async function generate(row, number) {
  const made = [];
  await sequences[row].clearHistory();
  const tokens = sequences[row].evaluate(prompts[row], {temperature: 0, yieldEogToken: true});
  for await (const token of tokens) {
    made.push(token);
    if (made.length === number) break;
  }
  return made;
}
const all = (number) => Promise.all(prompts.map((_, row) => generate(row, number)));

async function seconds(number) {
  const began = performance.now();
  await all(number);
  return (performance.now() - began) / 1000;
}

const tokens = await all(fresh + 1);
const installed = path.join(folder, "node_modules/node-llama-cpp/package.json");
const versions = {"node-llama-cpp": JSON.parse(fs.readFileSync(installed)).version, threads};
console.log(JSON.stringify({tokens, versions}));
for await (const line of readline.createInterface({input: process.stdin})) {
  if (line.trim() === "step") {
    const value = [await seconds(1), await seconds(fresh + 1)];
    console.log(JSON.stringify({seconds: value[0] + value[1], value}));
  } else {
    console.log(JSON.stringify({peak_bytes: 1024 * process.resourceUsage().maxRSS}));
  }
}
process.exit(0);
