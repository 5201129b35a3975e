"""`endwise serve`: what it tells of a text against a slow direct computation, and whom it refuses."""

import json
import os
import re
import threading
from http.client import HTTPConnection

import pytest
import torch

from bad_input import refused
from endwise import Clamp, Steer, load_model
from endwise.common.errors import ConfigError, RunFolderError
from endwise.common.text import printable
from endwise.config.run import DataConfig
from endwise.dashboard.server import LARGEST_REQUEST, DashboardServer, dashboard_server
from endwise.dashboard.text import OVER_TEXT, PER_TOKEN, PREDICTED, TextReader
from endwise.dictionaries import SAE
from endwise.features.explanations import Explanation, write_explanations
from endwise.features.steering import Sampling, steer
from made_harvests import write_harvested_run
from small_gpt2 import SITE

pytestmark = pytest.mark.usefixtures("loaded_once")

TEXT = "How to bake a cake:\nMix the flour, the sugar and the eggs."


@pytest.fixture(scope="module")
def embedded():
    return load_model()


@pytest.fixture(scope="module")
def run(tmp_path_factory, embedded):
    return write_harvested_run(tmp_path_factory.mktemp("served") / "run", 150, width=embedded.width(SITE))


@pytest.fixture(scope="module")
def server(run, embedded):
    with dashboard_server([run], model=embedded) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server, method="GET", path="/", body=None, **headers):
    """Status, headers and body of an answer; `Content_Type` and so on become headers."""
    connection = HTTPConnection(*server.server_address[:2], timeout=60)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name.replace("_", "-"), value)
        if body is not None and "Content_Length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def read(server, text=TEXT, **asked):
    body = json.dumps({"text": text, **asked}).encode()
    status, _, content = ask(server, "POST", "/api/text", body, Content_Type="application/json")
    return status, json.loads(content)


def steered(server, **asked):
    asked = {"text": TEXT, "feature": 3, "by": 6, "tokens": 5} | asked
    status, _, content = ask(server, "POST", "/api/steer", json.dumps(asked).encode(), Content_Type="application/json")
    return status, json.loads(content)


def slowly(model, run, text, bos=False):
    """Latents, logits of both passes and the tokens' CE, from the whole model run twice, with a hook at the site."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([([model.tokenizer.bos_token_id] if bos else []) + ids])
    sae, seen = SAE.load(run), {}

    def replace(_module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        seen["latents"] = torch.relu(x @ sae.W_enc + sae.b_enc)
        changed = seen["latents"] @ sae.W_dec + sae.b_dec
        if bos:
            changed[:, 0] = x[:, 0]
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    with torch.no_grad():
        clean = model.model(tokens).logits[0].log_softmax(-1)
        handle = model.model.transformer.h[1].register_forward_pre_hook(replace, with_kwargs=True)
        spliced = model.model(tokens).logits[0].log_softmax(-1)
        handle.remove()
    return tokens[0], seen["latents"][0], clean, spliced


def check(found, model, run, bos=False):
    tokens, latents, clean, spliced = slowly(model, run, TEXT, bos)
    if bos:
        latents[0] = 0
    assert found["tokens"] == [model.tokenizer.decode([token]) for token in tokens.tolist()]
    assert found["counts"] == [not (bos and at == 0) for at in range(len(tokens))]
    assert found["l0"] == (latents > 0).sum(1).tolist()
    for row, own in zip(found["active"], latents, strict=True):
        best = own.topk(PER_TOKEN)
        assert [value for _, value in row] == pytest.approx([v for v in best.values.tolist() if v > 0], rel=1e-3)
        assert [own[feature].item() for feature, _ in row] == pytest.approx([value for _, value in row], rel=1e-3)
    greatest = latents.amax(0).topk(OVER_TEXT)
    assert [max(each["values"]) for each in found["over_text"]] == pytest.approx(greatest.values.tolist(), rel=1e-3)
    for each in found["over_text"]:
        assert each["values"] == pytest.approx(latents[:, each["feature"]].tolist(), rel=1e-3, abs=1e-6)
    for listed, direct in ((found["clean"], clean), (found["spliced"], spliced)):
        for row, own in zip(listed, direct, strict=True):
            best = own.exp().topk(PREDICTED)
            assert [share for _, share in row] == pytest.approx(best.values.tolist(), rel=2e-3)
            assert row[0][0] == model.tokenizer.decode([best.indices[0].item()])
    for at in range(len(tokens)):
        if at == len(tokens) - 1 or (bos and at == 0):
            assert found["ce"][at] is None
        else:
            direct = [-each[at, tokens[at + 1]].item() for each in (clean, spliced)]
            assert found["ce"][at] == pytest.approx(direct, rel=2e-3)
    kl = (clean.exp() * (clean - spliced)).sum(-1) * torch.tensor(found["counts"])
    assert found["kl"] == pytest.approx(kl.tolist(), rel=2e-3, abs=1e-5)


def test_a_text_against_the_whole_model_run_twice(server, run, embedded):
    status, found = read(server)
    assert status == 200
    check(found, embedded, run)


def test_a_prepended_bos_keeps_its_activation(run, embedded):
    reader = TextReader(embedded, SAE.load(run), embedded.site(SITE), DataConfig(prepend_bos=True))
    assert reader.most_tokens == embedded.context - 1
    embedded.tokenizer.bos_token_id = 0
    check(reader.read(TEXT), embedded, run, bos=True)


def test_position_0_does_not_count_where_it_was_masked(run, embedded):
    reader = TextReader(embedded, SAE.load(run), embedded.site(SITE), DataConfig(mask_first_position=True))
    found = reader.read(TEXT)
    assert found["counts"] == [False] + [True] * (len(found["tokens"]) - 1)
    assert found["active"][0] == [] and found["l0"][0] == 0 and found["kl"][0] == 0


def test_a_text_is_continued_with_a_feature_added_to_or_set(server, run, embedded):
    saes = {SITE: SAE.load(run)}
    for how, edit in (("add", Steer(3, 6)), ("set", Clamp(3, 6))):
        expected = steer(embedded, saes, [edit], TEXT, sampling=Sampling(5))
        status, found = steered(server, how=how)
        assert status == 200
        for name in ("prompt", "clean", "steered"):
            assert found[name] == [printable(text) for text in getattr(expected, name)]
        assert found["kl"] == pytest.approx(expected.kl, rel=1e-3)
        assert found["kl_in_prompt"] == pytest.approx(expected.kl_in_prompt, rel=1e-3)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"text": ""}, "empty"),
        ({"text": "word " * 600}, r"more than 251\. Shorten"),
        ({"feature": 150}, "no feature 150"),
        ({"feature": -1}, "no feature -1"),
        ({"feature": True}, "whole numbers"),
        ({"feature": None}, "whole numbers"),
        ({"by": "8"}, "whole numbers"),
        ({"by": True}, "finite"),
        ({"by": float("nan")}, "finite"),
        ({"by": 10**400}, "finite"),
        ({"by": 1e30}, "overflows"),
        ({"how": "divide"}, "add or set"),
        ({"tokens": 0}, "from 1 to 64"),
        ({"tokens": 65}, "from 1 to 64"),
        ({"run": 1}, "from 0 to 0"),
    ],
)
def test_a_steering_that_cannot_be_is_refused_in_words(server, asked, told):
    status, found = steered(server, **asked)
    assert status == 400 and list(found) == ["error"]
    assert re.search(told, found["error"])


def test_many_at_once_get_what_each_would_get_alone(server):
    texts = [TEXT, "A dog runs.", "The man stands on a ladder.", "Cut the paper."] * 2
    alone = {text: read(server, text)[1] for text in texts}
    together = {}

    def one(number, text):
        together[number] = read(server, text)[1]

    threads = [threading.Thread(target=one, args=each) for each in enumerate(texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {number: alone[text] for number, text in enumerate(texts)}


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "empty"), ("word " * 600, r"more than 256\. Shorten"), (7, 'a "text"'), (None, 'a "text"')],
)
def test_a_text_that_cannot_be_read_is_refused_in_words(server, text, told):
    status, found = read(server, text)
    assert status == 400 and list(found) == ["error"]
    assert re.search(told, found["error"])


@pytest.mark.parametrize("number", [-1, 1, "0", True, None, [0]])
def test_a_run_that_is_not_there(server, number):
    status, found = read(server, run=number)
    assert status == 400 and "from 0 to 0" in found["error"]


def test_hidden_characters_come_back_written_out(server):
    hostile = "a\x1b[31m\u202eb <script>alert(1)</script>\udcff"
    status, found = read(server, hostile)
    assert status == 200 and not set("".join(found["tokens"])) & set("\x1b\u202e")
    status, found = steered(server, text=hostile)
    assert status == 200 and not set("".join(found["prompt"])) & set("\x1b\u202e")


def test_pages_and_their_types(server):
    for path, kind in (("/", "text/html"), ("/index.html", "text/html"), ("/app.js", "text/javascript")):
        status, headers, content = ask(server, path=path)
        assert status == 200 and headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert content == (server.folder / (path.strip("/") or "index.html")).read_bytes()
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
        status, headers, body = ask(server, "HEAD", path)
        assert status == 200 and body == b"" and int(headers["Content-Length"]) == len(content)
    status, headers, content = ask(server, path="/api/about")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(content) == {"texts": [{"most_tokens": 256}]}


@pytest.mark.parametrize(
    "path",
    ["/../config.yaml", "/%2e%2e/config.yaml", "/..%2fconfig.yaml", "//etc/passwd", "/data/../../config.yaml", "/\0",
     "/data", "/%00", "/..\\config.yaml", "/etc/passwd", "/data/", "/nothing.js", "/link.js", "/api/text", "/api"],
)  # fmt: skip
def test_nothing_outside_the_site_is_served(server, run, path):
    link = server.folder / "link.js"
    if not link.is_symlink():
        link.symlink_to(run / "config.yaml")
    assert (run / "config.yaml").exists()
    if "\0" in path:
        path = path.replace("\0", "%00")
    status, headers, content = ask(server, path=path)
    assert status == 404 and headers["Content-Type"] == "application/json" and b"objective" not in content


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", "", "127.0.0.1.evil.example"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_another_host_is_refused(server, host, method):
    body = json.dumps({"text": TEXT}).encode() if method == "POST" else None
    for path in ("/api/text", "/api/steer") if method == "POST" else ("/",):
        status, _, content = ask(server, method, path, body, Host=host, Content_Type="application/json")
        assert status == 403 and b"tokens" not in content


def test_localhost_is_this_machine(server):
    assert ask(server, Host=f"localhost:{server.server_address[1]}")[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_another_origin_is_refused(server, origin):
    body = json.dumps({"text": TEXT, "feature": 3, "by": 1, "tokens": 1}).encode()
    for path in ("/api/text", "/api/steer"):
        assert ask(server, "POST", path, body, Origin=origin, Content_Type="application/json")[0] == 403
        assert ask(server, "POST", path, body, Origin=server.url[:-1], Content_Type="application/json")[0] == 200


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (415, b'{"text": "a"}', {"Content_Type": "text/plain"}),
        (415, b'{"text": "a"}', {}),
        (400, b"{", {"Content_Type": "application/json"}),
        (400, b"[" * 60_000, {"Content_Type": "application/json"}),
        (400, b"\xff", {"Content_Type": "application/json"}),
        (400, b"[]", {"Content_Type": "application/json"}),
        (413, b"x" * (LARGEST_REQUEST + 1), {"Content_Type": "application/json"}),
        (413, None, {"Content_Type": "application/json", "Content_Length": "9" * 18}),
        (411, None, {"Content_Type": "application/json"}),
    ],
)
def test_what_is_no_question_is_refused(server, status, body, headers):
    for path in ("/api/text", "/api/steer"):
        found, kind, content = ask(server, "POST", path, body, **headers)
        assert found == status and kind["Content-Type"] == "application/json" and set(json.loads(content)) == {"error"}
    assert ask(server, "POST", "/", b"", Content_Type="application/json")[0] == 405
    assert ask(server, "PUT", "/", b"")[0] == 405


@pytest.mark.parametrize("length", ["9" * 30, "-1", "1e3"])
def test_a_length_that_is_no_number_is_refused(server, length):
    assert ask(server, "POST", "/api/text", Content_Type="application/json", Content_Length=length)[0] == 400


def test_it_listens_to_this_machine_alone(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken(server):
    with pytest.raises(ConfigError, match=r"--port"):
        DashboardServer(server.folder, [], server.server_address[1])


def test_a_folder_without_a_site(tmp_path):
    with pytest.raises(RunFolderError, match="endwise dashboard RUN"):
        DashboardServer(tmp_path, [])


def test_the_site_is_written_where_it_is_missing_or_old(tmp_path, embedded):
    run = write_harvested_run(tmp_path / "run", 20, width=embedded.width(SITE), groups=())
    site = run / "dashboard" / "data" / "site.js"

    def start(**settings):
        dashboard_server([run], model=embedded, **settings).server_close()
        return site.stat().st_mtime_ns

    first = start()
    assert start() == first
    assert start(again=True) > first
    write_explanations(run, [Explanation(0, "the word and", "m", "m")], {})
    explained = run / "explanations" / "explanations.json"
    os.utime(explained, ns=(2**62, 2**62))
    before = site.stat().st_mtime_ns
    assert start() > before  # what it shows is as new as the explanations
    os.utime(explained, ns=(0, 0))
    before = site.stat().st_mtime_ns
    assert start() == before
    os.utime(run / "harvest" / "harvest.json", ns=(2**62, 2**62))
    assert start() > first


def test_a_run_without_a_harvest(tmp_path):
    from made_dictionaries import directions, write_run

    assert "endwise harvest" in refused(
        "serve", write_run(tmp_path / "run", directions(9)), code=RunFolderError.exit_code
    )
