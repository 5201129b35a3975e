// Neuronpedia's own import route takes an export of ours into a database of its own schema:
//
//     npm install --ignore-scripts pg esbuild prisma@5.22 @prisma/client@5.22 @prisma/adapter-pg@5.22
//     POSTGRES_URL_NON_POOLING=postgresql://... node of_neuronpedia.mjs EXPORT CLONE
//
// EXPORT is OUT/MODEL/SOURCE, CLONE a clone of github.com/hijohnnylin/neuronpedia; the database is empty. The route,
// what it imports, the migrations and the Prisma schema are theirs. Stand-ins are: the bucket, whose files are ours; the
// request, which comes from localhost; the user to whom the export belongs; and Prisma's engine, of which the one in
// WebAssembly needs no download.

import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import zlib from 'node:zlib';

const require = createRequire(path.join(process.cwd(), 'package.json'));
const { Client } = require('pg');
const [folder, clone] = process.argv.slice(2).map((each) => path.resolve(each));
const app = path.join(clone, 'apps/webapp');
const [model, source] = folder.split(path.sep).slice(-2);
const work = path.resolve('neuronpedia-work');
const TABLES = {
  'release.jsonl': 'SourceRelease', 'model.jsonl': 'Model', 'sourceset.jsonl': 'SourceSet', 'source.jsonl': 'Source',
  features: 'Neuron', activations: 'Activation',
};
const STAND_INS = {
  '@/lib/db': `const { Pool } = require('pg'); const { PrismaPg } = require('@prisma/adapter-pg');
    const { PrismaClient } = require('.prisma/client/wasm');
    const pool = new Pool({ connectionString: process.env.POSTGRES_URL_NON_POOLING });
    exports.prisma = new PrismaClient({ adapter: new PrismaPg(pool) });`,
  '@/lib/env': 'exports.IS_LOCALHOST = true;',
  '@/lib/with-user': 'exports.withOptionalUser = (route) => route;',
  '@prisma/client': "module.exports = require('.prisma/client/wasm');",
  'next/server': 'exports.NextResponse = class extends Response {};',
  'node-gzip': "exports.ungzip = async (content) => require('zlib').gunzipSync(content);",
  '@aws-sdk/client-s3': `const fs = require('fs'); const path = require('path');
    class Given { constructor(told) { Object.assign(this, told); } }
    exports.GetObjectCommand = class extends Given {}; exports.ListObjectsV2Command = class extends Given {};
    const ours = (key) => path.join(process.env.EXPORT, key.split('/').slice(3).join('/'));
    exports.S3 = class { async send(asked) {
      if (asked.Prefix) {
        const where = ours(asked.Prefix);
        const names = fs.existsSync(where) ? fs.readdirSync(where).sort() : [];
        return { Contents: names.map((name) => ({ Key: asked.Prefix.replace(/\\/$/, '') + '/' + name })) };
      }
      if (asked.Key.startsWith('v1/config/')) return { Body: { transformToString: async () => '' } };
      const content = fs.readFileSync(ours(asked.Key));
      return { Body: { transformToByteArray: async () => content, transformToString: async () => content.toString() } };
    } };`,
};

function linesOf(file) {
  const content = fs.readFileSync(file);
  const text = (file.endsWith('.gz') ? zlib.gunzipSync(content) : content).toString();
  return text.split('\n').filter((line) => line.trim()).map((line) => JSON.parse(line));
}

function exported(name) {
  const where = path.join(folder, name);
  if (name.endsWith('.jsonl')) return linesOf(where);
  return fs.readdirSync(where).flatMap((file) => linesOf(path.join(where, file)));
}

async function makeTables(database) {
  const migrations = path.join(app, 'prisma/migrations');
  for (const name of fs.readdirSync(migrations).sort()) {
    const file = path.join(migrations, name, 'migration.sql');
    if (!fs.existsSync(file)) continue;
    // Vectors of explanations are kept as text, so that pgvector is not needed: nothing imported has any.
    const sql = fs.readFileSync(file, 'utf8').replace(/CREATE EXTENSION.*;/g, '').replace(/vector\(\d+\)/g, 'TEXT');
    await database.query(sql.replace(/CREATE INDEX[^;]*USING hnsw[^;]*;/gi, ''));
  }
  const creator = exported('model.jsonl')[0].creatorId;
  const user = 'INSERT INTO "User" (id, name, "emailUnsubscribeCode") VALUES ($1, $1, $1)';
  await database.query(user, [creator]);
}

async function openRoute() {
  fs.mkdirSync(work, { recursive: true });
  const schema = fs.readFileSync(path.join(app, 'prisma/schema.prisma'), 'utf8');
  const plain = schema.replace(/generator zod \{[^}]*\}/, '').replace(/^\s*binaryTargets.*$/m, '');
  fs.writeFileSync(path.join(work, 'schema.prisma'), plain);
  fs.writeFileSync(path.join(work, 'none.node'), '');
  const none = path.join(work, 'none.node');
  const env = { ...process.env, PRISMA_QUERY_ENGINE_LIBRARY: none, PRISMA_SCHEMA_ENGINE_BINARY: none };
  const generate = ['prisma', 'generate', '--schema', path.join(work, 'schema.prisma')];
  execFileSync('npx', generate, { env, stdio: ['ignore', 'ignore', 'inherit'] });
  const standIns = {
    name: 'stand-ins',
    setup(build) {
      build.onResolve({ filter: /^(@\/|next\/|node-gzip$|@aws-sdk\/|@prisma\/client$)/ }, ({ path: name }) => {
        if (name in STAND_INS) return { path: name, namespace: 'stand-in' };
        const file = path.join(app, name.replace('@/', ''));
        return { path: fs.existsSync(`${file}.ts`) ? `${file}.ts` : `${file}.tsx` };
      });
      const resolveDir = process.cwd();
      build.onLoad({ filter: /.*/, namespace: 'stand-in' }, ({ path: name }) => ({ contents: STAND_INS[name], resolveDir }));
      build.onLoad({ filter: /\.wasm$/ }, ({ path: file }) => ({
        contents: `export default new WebAssembly.Module(require('fs').readFileSync(${JSON.stringify(file)}))`,
      }));
    },
  };
  const outfile = path.join(work, 'route.cjs');
  await require('esbuild').build({
    entryPoints: [path.join(app, 'app/api/admin/import/route.ts')],
    bundle: true, platform: 'node', outfile, plugins: [standIns], logLevel: 'error', conditions: ['node'],
    nodePaths: [path.join(process.cwd(), 'node_modules')],
  });
  process.env.EXPORT = folder;
  return require(outfile).GET;
}

function same(ours, theirs) {
  if (theirs instanceof Date) return true;
  if (Array.isArray(ours)) return ours.length === theirs.length && ours.every((each, i) => same(each, theirs[i]));
  return ours === theirs;
}

async function compare(database, name) {
  const table = TABLES[name];
  const ours = exported(name);
  const { rows } = await database.query(`SELECT * FROM "${table}"`);
  if (rows.length !== ours.length) throw new Error(`${table}: ${ours.length} rows were exported, ${rows.length} are there`);
  const keys = Object.keys(ours[0]).filter((key) => ['id', 'name', 'index', 'layer', 'modelId'].includes(key));
  const keyOf = (row) => JSON.stringify(keys.map((key) => row[key]));
  const found = new Map(rows.map((row) => [keyOf(row), row]));
  for (const row of ours) {
    for (const [column, value] of Object.entries(row)) {
      const theirs = found.get(keyOf(row))?.[column];
      if (theirs === undefined || !same(value, theirs)) {
        throw new Error(`${table}.${column} of ${keyOf(row)}: ${JSON.stringify(value)} became ${JSON.stringify(theirs)}`);
      }
    }
  }
  console.log(`${table}: ${rows.length} rows, all ${Object.keys(ours[0]).length} columns as exported`);
}

const database = new Client({ connectionString: process.env.POSTGRES_URL_NON_POOLING });
await database.connect();
await makeTables(database);
const GET = await openRoute();
const errors = [];
console.error = (...told) => errors.push(told.map(String).join(' '));
const log = console.log;
console.log = () => {};
const answer = await (await GET(new Request(`http://localhost/?modelId=${model}&sourceId=${source}`))).text();
console.log = log;
if (!answer.includes('event: complete')) throw new Error(`the import ended in ${answer.slice(-500)} ${errors.join('; ')}`);
for (const name of Object.keys(TABLES)) await compare(database, name);
if (errors.length) console.log(`it told of: ${errors.map((each) => each.slice(0, 200)).join('; ')}`);
process.exit(0);
