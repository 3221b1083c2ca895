"""The page in a real browser, headless."""

import shutil

import pytest

from lfm.serving.served import Served
from tests.inference.small_models import V, make
from tests.serving.local_server import running, small_tokenizer, until

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs a browser: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,1100",
    ):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


def test_a_prompt_is_typed_its_answer_read_and_stopped(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    tokenizer = small_tokenizer(V)
    served = {kind: Served(kind, 7, make(kind), tokenizer) for kind in ("liquidnet", "lfm")}

    def of(name):
        return browser.find_element(By.ID, name)

    def status():
        return of("status").text

    def set_to(name, value):
        of(name).clear()
        of(name).send_keys(value)

    with running(served, max_new_tokens=20_000) as (address, api):
        browser.get(address)
        until(lambda: "liquidnet: liquidnet, step 7" in of("about").text)
        assert "text of any length" in of("model-about").text

        # The keyboard alone: the prompt has the focus.
        prompt = browser.switch_to.active_element
        assert prompt.get_attribute("id") == "prompt"
        set_to("max_tokens", "30")
        set_to("temperature", "0")
        prompt.send_keys("the time" + Keys.CONTROL + Keys.ENTER)
        until(lambda: "ended by length: 30 tokens" in status())
        greedy = of("answer").text
        assert greedy.startswith("the time") and len(greedy) > 20
        assert "2 tensors of 32 numbers" in of("state-about").text and not of("experts-box").is_displayed()
        drawn = browser.execute_script(
            "const c = document.getElementById('state');"
            "return new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        assert drawn > 4

        # Sampling changes the answer, and its seed gives it again.
        set_to("temperature", "1.5")
        set_to("seed", "11")
        answers = []
        for _ in range(2):
            of("send").click()
            until(lambda: status() != "reading" and of("send").is_enabled() and "30 tokens" in status())
            answers.append(of("answer").text)
        assert answers[0] == answers[1] != greedy

        # Stopped while it is made; its slot is free then.
        set_to("max_tokens", "20000")
        of("send").click()
        until(lambda: "a second" in status())
        of("answer").send_keys(Keys.ESCAPE)
        until(lambda: "stopped after" in status())
        until(lambda: api.engines["liquidnet"].outstanding == 0)

        # Another model, in a chat, with experts; and a refusal.
        Select(of("model")).select_by_value("lfm")
        until(lambda: "context of 128 tokens" in of("model-about").text)
        of("chat").click()
        set_to("max_tokens", "12")
        of("send").click()
        until(lambda: "ended by length: 12 tokens" in status())
        assert of("experts-box").is_displayed() and "2 layers of 4 experts" in of("experts-about").text
        set_to("max_tokens", "50000")
        of("send").click()
        until(lambda: "the most are 20000" in status())

        # Dark and light differ, and the choice stays.
        before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        of("theme").click()
        after = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        browser.refresh()
        assert before != after == browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        log = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        loud = [entry for entry in log if "400 (Bad Request)" not in entry["message"]]
        assert loud == []


def test_a_token_is_asked_for_once(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    token = "a-token-of-some-length"
    served = {"small": Served("small", 7, make("liquidnet"), small_tokenizer(V))}
    with running(served, token=token) as (address, _):
        browser.get(address)
        until(lambda: browser.find_element(By.ID, "token-box").is_displayed())
        assert "token is missing" in browser.find_element(By.ID, "status").text
        browser.switch_to.active_element.send_keys(token + Keys.ENTER)
        until(lambda: "small: liquidnet" in browser.find_element(By.ID, "about").text)
        browser.refresh()
        until(lambda: "small: liquidnet" in browser.find_element(By.ID, "about").text)
        assert not browser.find_element(By.ID, "token-box").is_displayed()
