"""The page, in headless Chromium."""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from xfuser.testing.serving import PATIENCE, until

pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="requires the packages chromium, chromium-driver")


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,1000"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.matrix
def test_a_person_draws_and_cancels(browser, elastic_served):
    """This must be the last test with this server, as it ends the server with Ctrl-C."""
    try:
        browser.get(elastic_served.ready().url)
        wait = WebDriverWait(browser, PATIENCE, 0.05)

        def find(css):
            return wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, css))[0]

        def status_tells(text):
            wait.until(lambda _: text in browser.find_element(By.ID, "status").text)

        assert "2 ranks: ulysses 2" in find(".prose h2 + p").text
        find("#steps input[type=number]").clear()
        find("#steps input[type=number]").send_keys("4\t")
        find("#seed textarea, #seed input").send_keys("3")
        find("#draw").click()
        status_tells("done, seed 3")
        assert find("#picture img") and find("#history img")
        find("#steps input[type=number]").clear()
        find("#steps input[type=number]").send_keys("100\t")
        find("#draw").click()
        status_tells("of 100")
        before = elastic_served.metric("xdit_steps_total")
        find("#cancel").click()
        status_tells("cancelled")
        until(lambda: not elastic_served.metric("xdit_running"), "the end of the cancelled call")
        assert elastic_served.metric("xdit_steps_total") - before < 50
        find("#prompt textarea, #prompt input").send_keys(Keys.CONTROL + "a", Keys.DELETE)
        find("#draw").click()
        wait.until(lambda _: "at least 1 character" in browser.find_element(By.TAG_NAME, "body").text)
    finally:
        assert elastic_served.interrupt() <= 5
