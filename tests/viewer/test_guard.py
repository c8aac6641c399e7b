"""Who is answered: rebound names, other sites, wrong tokens, and addresses that would be open to a network."""

import pytest

from engine.viewer.config import ViewConfig
from engine.viewer.guard import COOKIE, Guard

LOCAL = Guard("127.0.0.1")
TOKEN = "a-secret-of-30-letters-or-more"


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:9000", "[::1]:8765", "LOCALHOST", "127.0.0.2"])
def test_this_machine_by_any_of_its_names(host: str) -> None:
    assert LOCAL.refusal({"Host": host}, writes=False, opens_page=False) is None


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example:8765", "192.168.0.9",
     "127.0.0.1:8765, evil.example", "evil.example@127.0.0.1x", "[::1", "0.0.0.0"],
)  # fmt: skip
def test_a_name_that_was_pointed_here_is_refused(host: str) -> None:
    refused = LOCAL.refusal({"Host": host}, writes=False, opens_page=True)
    assert refused is not None
    assert refused[0] == 421


def test_a_network_address_is_answered_only_where_it_was_asked_for() -> None:
    wide = Guard("0.0.0.0", TOKEN)
    assert wide.refusal({"Host": "192.168.0.9:8765"}, writes=False, opens_page=False) is None
    assert wide.refusal({"Host": "evil.example"}, writes=False, opens_page=False) is not None
    assert Guard("node7", TOKEN).refusal({"Host": "node7:8765"}, writes=False, opens_page=False) is None


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:8765", "http://127.0.0.1:8888"])
@pytest.mark.parametrize("writes", [True, False])
def test_pages_of_others_are_refused(origin: str, writes: bool) -> None:
    headers = {"Host": "127.0.0.1:8765", "Origin": origin}
    assert LOCAL.refusal(headers, writes, opens_page=not writes) is not None


def test_work_is_started_by_our_page_alone() -> None:
    assert LOCAL.refusal({"Host": "127.0.0.1:8765"}, writes=True, opens_page=False) is not None
    ours = {"Host": "127.0.0.1:8765", "Origin": "http://127.0.0.1:8765"}
    assert LOCAL.refusal(ours, writes=True, opens_page=False) is None


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_to_the_page_and_load_nothing(site: str) -> None:
    headers = {"Host": "127.0.0.1:8765", "Sec-Fetch-Site": site}
    assert LOCAL.refusal(headers, writes=False, opens_page=True) is None
    assert LOCAL.refusal(headers, writes=False, opens_page=False) is not None


def test_the_token_as_cookie_and_as_bearer() -> None:
    guard = Guard("127.0.0.1", TOKEN)
    assert TOKEN not in guard.cookie
    kept = guard.cookie.partition(";")[0]
    assert guard.knows({"Cookie": kept})
    assert guard.knows({"Authorization": f"Bearer {TOKEN}"})
    cookies = [{"Cookie": text} for text in (f"{COOKIE}={TOKEN}", kept[:-1], 'a="')]
    others = [{"Authorization": text} for text in ("Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}")]
    for headers in ({}, *cookies, *others):
        assert not guard.knows(headers)
    assert "HttpOnly" in guard.cookie
    assert "SameSite=Strict" in guard.cookie


def test_no_script_and_style_from_anywhere_but_here() -> None:
    policy = LOCAL.headers()["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "sandbox" in LOCAL.headers(report=True)["Content-Security-Policy"]
    assert "script-src" not in LOCAL.headers(report=True)["Content-Security-Policy"]


def test_what_may_start_work_is_never_framed() -> None:
    assert "frame-ancestors 'self'" in LOCAL.headers()["Content-Security-Policy"]
    for guard in (Guard("127.0.0.1", allow_write=True), Guard("0.0.0.0", TOKEN)):
        assert "frame-ancestors 'none'" in guard.headers()["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"host": "0.0.0.0"}, "unless a --token is given"),
        ({"host": "node7"}, "unless a --token is given"),
        ({"token": "short"}, "at least 16"),
        ({"port": 70000}, "0..65535"),
        ({"mpp": -1.0}, "positive"),
    ],
)
def test_settings_that_would_open_it_are_refused(config: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        ViewConfig("runs", **config)
    assert ViewConfig("runs", host="0.0.0.0", token=TOKEN).token == TOKEN
