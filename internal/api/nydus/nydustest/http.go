package nydustest

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// http sends a request, as often as the step says, and returns the answer: the first
// one that is not expected if there is any.
func (s *sequence) http(t *testing.T, d *datadriven.TestData) string {
	times := 1
	if n := argument(d, "parallel"); n != "" {
		var err error
		if times, err = strconv.Atoi(n); err != nil {
			d.Fatalf(t, "parallel: %v", err)
		}
	}
	answers := make([]string, times)
	var all sync.WaitGroup
	for i := range answers {
		all.Go(func() { answers[i] = s.do(t, d) })
	}
	all.Wait()
	for _, a := range answers {
		if !s.matches(d.Expected, a) {
			return a
		}
	}
	return answers[0]
}

// do sends a request once.
func (s *sequence) do(t *testing.T, d *datadriven.TestData) string {
	first, body, _ := strings.Cut(s.expand(d.Input), "\n")
	method, target, _ := strings.Cut(first, " ")
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	if d.HasArg("chunked") {
		r = io.MultiReader(r) // of a length that the client does not know
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://nydus", r)
	if err != nil {
		return err.Error()
	}
	req.URL.Opaque = target // as it is
	res, err := s.client.Do(req)
	if err != nil {
		return err.Error()
	}
	return s.answer(t, d, res)
}

// raw sends bytes on a connection of their own and returns the answers.
func (s *sequence) raw(t *testing.T, d *datadriven.TestData) string {
	text := strings.ReplaceAll(s.expand(d.Input), "\n", "\r\n")
	if n := argument(d, "long"); n != "" {
		size, err := strconv.Atoi(n)
		if err != nil {
			d.Fatalf(t, "long: %v", err)
		}
		text = strings.ReplaceAll(text, "${LONG}", strings.Repeat("x", size))
	}
	if !d.HasArg("body") {
		text += "\r\n\r\n"
	}
	c := s.dial(t)
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.WriteString(c, text) // a server may stop to read, and answer
	}()
	defer func() { <-sent }()
	count := 1
	if n := argument(d, "answers"); n != "" {
		count, _ = strconv.Atoi(n)
	}
	in := bufio.NewReader(c)
	var answers []string
	for range count {
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			answers = append(answers, err.Error())
			break
		}
		if d.HasArg("foreign") { // the server's own answer to what is no request
			answers = append(answers, strconv.Itoa(res.StatusCode))
			if _, err := io.Copy(io.Discard, res.Body); err != nil {
				answers = append(answers, err.Error())
			}
			res.Body.Close()
			continue
		}
		answers = append(answers, strings.TrimSuffix(s.answer(t, d, res), "\n"))
	}
	if d.HasArg("closes") {
		if n, err := io.Copy(io.Discard, in); n != 0 || err != nil {
			answers = append(answers, fmt.Sprintf("then %d bytes, %v", n, err))
		}
	}
	return strings.Join(answers, "\n") + "\n"
}

// answer checks what every answer must have and returns its status and body.
func (s *sequence) answer(t *testing.T, d *datadriven.TestData, res *http.Response) string {
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Errorf("%s: read the answer: %v", d.Pos, err)
	}
	res.Body.Close()
	wrong := func(what string) { t.Errorf("%s: %s\n%s\nanswer: %v\n%s", d.Pos, what, d.Input, res.Header, body) }
	head := res.Header
	if head.Get("Server") != "Nydus API" {
		wrong("Server is not Nydus API")
	}
	empty := res.StatusCode == http.StatusNoContent
	if empty && (len(body) > 0 || head.Get("Content-Type") != "" || head.Get("Content-Length") != "") {
		wrong("204 with a body, or with the headers of one")
	}
	if !empty && head.Get("Content-Type") != "application/json" {
		wrong("Content-Type is not application/json")
	}
	if strings.HasSuffix(string(body), "\n") {
		wrong("a newline at the end")
	}
	if !d.HasArg("secret") {
		for _, name := range []string{"SECRET", "AUTH", "AUTH2"} {
			if strings.Contains(string(body), s.vars[name]) {
				wrong("the answer has the " + name)
			}
		}
	}
	if len(body) == 0 {
		return strconv.Itoa(res.StatusCode) + "\n"
	}
	return fmt.Sprintf("%d\n%s\n", res.StatusCode, body)
}
