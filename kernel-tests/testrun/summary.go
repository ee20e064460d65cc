package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

const module = "github.com/erofsd/erofsd/"

// event is a line of go test -json (cmd/test2json).
type event struct {
	Action      string
	Package     string
	ImportPath  string // of a build that failed
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// summary adds up the runs of go test and prints them.
type summary struct {
	w                       io.Writer
	passed, failed, skipped int
	reasons                 map[string]int // why tests were skipped
	failures                []string       // a line for each failed test, and what it said first
	label                   string         // after the names of packages
	timedOut                int            // fuzz targets that go test failed for ending in time
}

func newSummary(w io.Writer) *summary { return &summary{w: w, reasons: make(map[string]int)} }

func (s *summary) note(line string) { fmt.Fprintln(s.w, line) }

func (s *summary) skip(reason string) {
	s.skipped++
	s.reasons[reason]++
}

// print ends the output: the counts alone on a line, what was skipped and why, and once
// more, without their logs, what failed.
func (s *summary) print() {
	fmt.Fprintf(s.w, "\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	var list []string
	for _, reason := range slices.Sorted(maps.Keys(s.reasons)) {
		list = append(list, fmt.Sprintf("%s (%d)", reason, s.reasons[reason]))
	}
	if len(list) == 0 {
		list = []string{"nothing"}
	}
	fmt.Fprintf(s.w, "skipped: %s\n", strings.Join(list, "; "))
	for _, f := range s.failures {
		fmt.Fprintln(s.w, f)
	}
}

// goTest runs go test with more environment variables, if any, and counts its
// results. The error is about running it, not about tests that fail.
func (s *summary) goTest(ctx context.Context, env []string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // go test ends its children, too
	cmd.Env, cmd.Stderr = append(os.Environ(), env...), os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	failed, timedOut := s.failed, s.timedOut
	readErr := s.read(out)
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && (s.failed > failed || s.timedOut > timedOut) {
		err = nil // the failure has been counted, or is none
	}
	return errors.Join(readErr, err, ctx.Err())
}

// packageRun is what is known of a package whose tests are running.
type packageRun struct {
	passed, failed, skipped int
	timedOut                bool
	output                  map[string][]string // by test; "" for the package's own
}

// read counts the events of r and prints a line for each package that ends.
func (s *summary) read(r io.Reader) error {
	running := make(map[string]*packageRun)
	builds := make(map[string][]string)
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			s.note(lines.Text()) // what the go command itself says
			continue
		}
		if e.Action == "build-output" {
			builds[e.ImportPath] = append(builds[e.ImportPath], e.Output)
			continue
		}
		p := running[e.Package]
		if p == nil {
			p = &packageRun{output: make(map[string][]string)}
			running[e.Package] = p
		}
		switch {
		case e.Action == "output":
			p.output[e.Test] = append(p.output[e.Test], e.Output)
		case e.Test == "":
			s.endPackage(p, e, builds[e.FailedBuild])
		default:
			s.endTest(p, e)
		}
	}
	return lines.Err()
}

func (s *summary) endTest(p *packageRun, e event) {
	switch e.Action {
	case "pass":
		p.passed++
	case "skip":
		p.skipped++
		s.skip(reason(p.output[e.Test]))
	case "fail":
		if fuzzTimedOut(e.Test, p.output[e.Test]) {
			p.passed++
			p.timedOut = true
			s.timedOut++
			break
		}
		p.failed++
		name := strings.TrimPrefix(e.Package, module) + s.label + " " + e.Test
		s.failures = append(s.failures, "failed: "+name+said(p.output[e.Test]))
		fmt.Fprintf(s.w, "FAIL  %s\n%s", name, strings.Join(p.output[e.Test], ""))
	default:
		return
	}
	delete(p.output, e.Test)
}

// endPackage prints the line of a package. One that fails although no test of it
// did counts as one that failed: it does not build, or left something behind.
func (s *summary) endPackage(p *packageRun, e event, build []string) {
	name := strings.TrimPrefix(e.Package, module) + s.label
	switch {
	case e.Action == "fail" && p.timedOut && p.failed == 0:
		fmt.Fprintf(s.w, "ok    %-36s %4d passed %3d skipped %6.1f s\n", name, p.passed, p.skipped, e.Elapsed)
	case e.Action == "fail" && p.failed == 0:
		p.failed++
		s.failures = append(s.failures, "failed: "+name)
		fmt.Fprintf(s.w, "FAIL  %s\n%s%s", name, strings.Join(build, ""), strings.Join(p.output[""], ""))
		for test, out := range p.output { // a test that was running when the process died
			if test != "" {
				fmt.Fprintf(s.w, "%s", strings.Join(out, ""))
			}
		}
	case e.Action == "fail": // what a guest's kernel said is here
		fmt.Fprint(s.w, strings.Join(p.output[""], ""))
	case e.Action == "pass" && p.passed+p.skipped > 0:
		fmt.Fprintf(s.w, "ok    %-36s %4d passed %3d skipped %6.1f s\n", name, p.passed, p.skipped, e.Elapsed)
	case e.Action != "pass":
		return
	}
	s.passed += p.passed
	s.failed += p.failed
}

// fuzzTimedOut reports whether a fuzz target found nothing and go test failed it all
// the same, because its time ended while a worker was being asked for its results:
// the coordinator then takes its own deadline for an error of the worker.
func fuzzTimedOut(test string, output []string) bool {
	all := strings.Join(output, "")
	return strings.HasPrefix(test, "Fuzz") && strings.Contains(all, "now fuzzing") &&
		!strings.Contains(all, "Failing input") && strings.HasSuffix(strings.TrimSpace(all), "context deadline exceeded")
}

var message = regexp.MustCompile(`^\s*\S+\.go:\d+: (.*)`)

// said returns the first messages of a test that failed, each shortened to a line.
func said(output []string) string {
	var b strings.Builder
	for _, line := range output {
		if message.MatchString(line) {
			line = strings.TrimSpace(line)
			fmt.Fprintf(&b, "\n  %s", line[:min(len(line), 400)])
		}
		if strings.Count(b.String(), "\n") == 4 {
			break
		}
	}
	return b.String()
}

// reason returns the message of a test that was skipped.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		if m := message.FindStringSubmatch(line); m != nil {
			return strings.TrimSpace(m[1])
		}
	}
	return "no reason given"
}
