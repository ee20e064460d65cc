package main

import (
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"
)

// complaint matches what a kernel says when something is wrong with it:
// lib/bug.c, kernel/panic.c, kernel/hung_task.c, 6.1.
var complaint = regexp.MustCompile(`\b(BUG|WARNING|KASAN|UBSAN): |\bOops\b|general protection fault|blocked for more than \d+ seconds|Kernel panic`)

// logLines is how much of a kernel's log is worth reading.
const logLines = 80

// judge says what happened, where the program did not say it itself, and returns the
// exit code.
func (o *outcome) judge(w io.Writer, verbose bool, timeout time.Duration) int {
	code := exitProblem
	if o.result != nil {
		code = o.result.Exit
		if o.result.Problem != "" {
			fmt.Fprintln(w, "vm:", o.result.Problem)
		}
	}
	switch line := complaint.FindString(o.kernelLog); {
	case o.timedOut:
		fmt.Fprintf(w, "vm: the guest was stopped after %v\n", timeout)
		code = max(code, 1)
	case o.result == nil:
		fmt.Fprintln(w, "vm: the guest ended without a result")
	case line != "":
		fmt.Fprintf(w, "vm: the guest's kernel complains (%s)\n", strings.TrimSpace(line))
		code = max(code, 1)
	}
	if code != 0 || verbose {
		fmt.Fprintf(w, "vm: the end of the guest's kernel log:\n%s", o.logTail(verbose))
	}
	return code
}

// logTail is the log since the start of user space, or all of it when user space never
// started; without everything, only its end.
func (o *outcome) logTail(everything bool) string {
	log := o.kernelLog
	if everything {
		return log
	}
	if _, after, found := strings.Cut(log, startMark+"\n"); found && !complaint.MatchString(log[:len(log)-len(after)]) {
		log = after
	}
	lines := strings.SplitAfter(log, "\n")
	if at := complaint.FindStringIndex(log); at != nil { // the first one is the one to read
		first := strings.Count(log[:at[0]], "\n")
		lines = lines[max(0, first-5):]
		return strings.Join(lines[:min(len(lines), 2*logLines)], "")
	}
	return strings.Join(lines[max(0, len(lines)-logLines):], "")
}
