package main

import (
	"strings"
	"testing"
)

func TestSummary(t *testing.T) {
	const events = `{"Action":"start","Package":"github.com/erofsd/erofsd/a"}
{"Action":"run","Package":"github.com/erofsd/erofsd/a","Test":"TestOne"}
{"Action":"output","Package":"github.com/erofsd/erofsd/a","Test":"TestOne","Output":"noise of a test that passes\n"}
{"Action":"pass","Package":"github.com/erofsd/erofsd/a","Test":"TestOne","Elapsed":0.1}
{"Action":"output","Package":"github.com/erofsd/erofsd/a","Test":"TestTwo","Output":"    a_test.go:7: needs root\n"}
{"Action":"output","Package":"github.com/erofsd/erofsd/a","Test":"TestTwo","Output":"--- SKIP: TestTwo (0.00s)\n"}
{"Action":"skip","Package":"github.com/erofsd/erofsd/a","Test":"TestTwo"}
{"Action":"pass","Package":"github.com/erofsd/erofsd/a","Elapsed":1.5}
{"Action":"output","Package":"github.com/erofsd/erofsd/b","Test":"TestBad","Output":"    b_test.go:9: got 1, want 2\n"}
{"Action":"fail","Package":"github.com/erofsd/erofsd/b","Test":"TestBad"}
{"Action":"output","Package":"github.com/erofsd/erofsd/b","Output":"vm: the guest's kernel complains\n"}
{"Action":"fail","Package":"github.com/erofsd/erofsd/b"}
{"ImportPath":"github.com/erofsd/erofsd/c","Action":"build-output","Output":"c.go:1: undefined: x\n"}
{"Action":"fail","Package":"github.com/erofsd/erofsd/c","FailedBuild":"github.com/erofsd/erofsd/c"}
{"Action":"pass","Package":"github.com/erofsd/erofsd/d","Test":"TestFine"}
{"Action":"output","Package":"github.com/erofsd/erofsd/d","Output":"FAIL: the tests left behind: a goroutine\n"}
{"Action":"fail","Package":"github.com/erofsd/erofsd/d"}
{"Action":"skip","Package":"github.com/erofsd/erofsd/e"}
`
	var out strings.Builder
	s := newSummary(&out)
	if err := s.read(strings.NewReader(events)); err != nil {
		t.Fatal(err)
	}
	s.print()
	got := out.String()
	for _, want := range []string{
		"\n2 passed, 3 failed, 1 skipped\nskipped: needs root (1)\nfailed: b TestBad\n  b_test.go:9: got 1, want 2\nfailed: c\nfailed: d\n",
		"FAIL  b TestBad\n    b_test.go:9: got 1, want 2\nvm: the guest's kernel complains\n",
		"FAIL  c\nc.go:1: undefined: x\n",
		"left behind: a goroutine",
		"ok    a ",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the output has no %q:\n%s", want, got)
		}
	}
	if strings.Contains(got, "noise") {
		t.Errorf("the output shows what a test that passed printed:\n%s", got)
	}
}

func TestFuzzTimedOut(t *testing.T) {
	const progress = "fuzz: elapsed: 0s, gathering baseline coverage: 29/29 completed, now fuzzing with 2 workers\n"
	for name, tc := range map[string]struct {
		test, output string
		want         bool
	}{
		"end of its time":  {"FuzzEvents", progress + "--- FAIL: FuzzEvents (10.08s)\n    context deadline exceeded\n", true},
		"a finding":        {"FuzzEvents", progress + "--- FAIL: FuzzEvents (3s)\n    wrong\n    Failing input written to testdata\n    context deadline exceeded\n", false},
		"another error":    {"FuzzEvents", progress + "--- FAIL: FuzzEvents (3s)\n    wrong\n", false},
		"before fuzzing":   {"FuzzEvents", "--- FAIL: FuzzEvents (3s)\n    context deadline exceeded\n", false},
		"an ordinary test": {"TestEvents", progress + "    context deadline exceeded\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := fuzzTimedOut(tc.test, []string{tc.output}); got != tc.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
