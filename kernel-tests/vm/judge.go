package main

import (
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"
)

// complaint matches what a kernel says when something is wrong with it:
// lib/bug.c, kernel/panic.c, kernel/hung_task.c, mm/kasan/report.c, 6.1.
var complaint = regexp.MustCompile(`\b(BUG|WARNING|KASAN|UBSAN):|\bOops\b|general protection fault|blocked for more than \d+ seconds|Kernel panic`)

// How much of a kernel's log is worth reading after a complaint and otherwise.
const (
	complaintLines = 100
	failureLines   = 40
)

// judge says what happened, where the program did not say it itself, and returns the
// exit code.
func (o *outcome) judge(w io.Writer, timeout time.Duration) int {
	code := exitProblem
	if o.result != nil {
		code = o.result.Exit
		if o.result.Problem != "" {
			fmt.Fprintln(w, "vm:", o.result.Problem)
		}
	}
	said := complaint.FindString(o.kernelLog)
	switch {
	case o.timedOut:
		fmt.Fprintf(w, "vm: the guest was stopped after %v\n", timeout)
		code = max(code, 1)
	case o.result == nil:
		fmt.Fprintln(w, "vm: the guest ended without a result")
	case said != "":
		fmt.Fprintf(w, "vm: the guest's kernel complains (%s)\n", said)
		code = max(code, 1)
	}
	return code
}

// logExcerpt is what to read of the kernel's log after a failure: from the first
// complaint on, else the end of what came between boot and turning off.
func (o *outcome) logExcerpt() string {
	if at := complaint.FindStringIndex(o.kernelLog); at != nil {
		from := strings.LastIndex(o.kernelLog[:at[0]], "\n") + 1
		lines := strings.SplitAfter(o.kernelLog[from:], "\n")
		return strings.Join(lines[:min(len(lines), complaintLines)], "")
	}
	lines := strings.SplitAfter(o.kernelLog, "\n")
	at := func(mark string) int {
		return slices.IndexFunc(lines, func(line string) bool { return strings.HasSuffix(line, mark+"\n") })
	}
	if end := at(endMark); end >= 0 {
		lines = lines[:end]
	}
	lines = lines[at(startMark)+1:]
	return strings.Join(lines[max(0, len(lines)-failureLines):], "")
}
