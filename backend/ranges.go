package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// maxSkip is how many bytes are read and thrown away when a server sends the
// whole blob for a range: less than what a round trip is worth.
const maxSkip = 256 << 10

// A RangeRequest asks for a range of a blob in one HTTP request.
type RangeRequest struct {
	Ref  Ref           // of the blob, for errors
	Size int64         // of the blob; -1: not known yet
	Off  int64         // of the range, which is not empty
	P    []byte        // where its bytes go
	Wait time.Duration // how long there may be no progress
	// Send sends the request with header, which says the range.
	Send func(ctx context.Context, header http.Header) (*http.Response, error)
}

// Do fills P, or leaves it undefined with an error. It accepts only what is surely the
// range that was asked for, of a blob of Size. size is the blob's size as the server
// gives it, even with an error, -1 when it did not; from is who answered in the end.
func (q RangeRequest) Do(ctx context.Context) (size int64, from *url.URL, err error) {
	w := NewWatch(ctx, q.Wait)
	defer w.Stop()
	resp, err := q.Send(w.Context(), http.Header{
		"Range":           {fmt.Sprintf("bytes=%d-%d", q.Off, q.Off+int64(len(q.P))-1)},
		"Accept-Encoding": {"identity"},
	})
	if err != nil {
		return -1, nil, w.Fail(err)
	}
	defer resp.Body.Close()
	w.Answered()
	size, skip, err := q.accept(resp)
	if err != nil {
		// A short body that is read to its end leaves the connection usable.
		io.CopyN(io.Discard, resp.Body, minProgress)
		return size, nil, err
	}
	err = w.Fail(receive(w.Reader(resp.Body), q.P, skip, resp.StatusCode == http.StatusPartialContent))
	return size, resp.Request.URL, err
}

// Learn returns the size of a blob of unknown size by reading its first byte, which only
// an empty blob has not (RFC 9110, 14.1.2). Off and P do not matter.
func (q RangeRequest) Learn(ctx context.Context) (size int64, from *url.URL, err error) {
	q.Size, q.Off, q.P = -1, 0, make([]byte, 1)
	size, from, err = q.Do(ctx)
	if status, ok := errors.AsType[*StatusError](err); ok && status.Code == http.StatusRequestedRangeNotSatisfiable {
		return 0, from, nil
	}
	if size == 0 {
		return 0, from, nil
	}
	if err == nil && size < 0 {
		err = errors.New("the server does not say how large it is: give the size in the reference")
	}
	return size, from, err
}

// accept checks that resp is the answer to q. skip is how many bytes of its body come
// before the range.
func (q RangeRequest) accept(resp *http.Response) (size, skip int64, err error) {
	n := int64(len(q.P))
	switch resp.StatusCode {
	case http.StatusPartialContent:
		first, last, total, err := parseContentRange(resp.Header.Get("Content-Range"))
		if err != nil {
			return -1, 0, err
		}
		if size = total; first != q.Off || last != q.Off+n-1 {
			err = fmt.Errorf("asked for bytes %d to %d, the server sent %d to %d", q.Off, q.Off+n-1, first, last)
			return size, 0, errors.Join(q.checkSize(size), err)
		}
		if length := resp.ContentLength; length >= 0 && length != n {
			return size, 0, fmt.Errorf("asked for %d bytes, the server announces %d: %w", n, length, io.ErrUnexpectedEOF)
		}
	case http.StatusOK:
		size, skip = resp.ContentLength, q.Off
		if skip > maxSkip {
			return size, 0, errors.New("the server sent the whole blob for a range: it or a proxy before it does not support ranges, which lazy images need")
		}
	case http.StatusRequestedRangeNotSatisfiable:
		if total, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes */"); ok {
			if size, err = strconv.ParseInt(total, 10, 64); err == nil && q.Size >= 0 && size != q.Size {
				return size, 0, q.checkSize(size)
			}
		}
		return -1, 0, NewStatusError(resp)
	default:
		return -1, 0, NewStatusError(resp)
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return size, 0, errors.New("the server encodes ranges though it was asked not to: blobs must be served as stored")
	}
	return size, skip, q.checkSize(size)
}

// checkSize compares the size that the server gives, -1 when it does not, with
// ours, -1 before it is known.
func (q RangeRequest) checkSize(size int64) error {
	if size < 0 || q.Size < 0 || size == q.Size {
		return nil
	}
	return CheckSize(Ref{Digest: q.Ref.Digest, Size: q.Size}, size)
}

// receive fills p from a body. exact says that the body must end then.
func receive(body io.Reader, p []byte, skip int64, exact bool) error {
	if skip > 0 {
		if _, err := io.CopyN(io.Discard, body, skip); err != nil {
			return short(err)
		}
	}
	if n, err := io.ReadFull(body, p); err != nil {
		return fmt.Errorf("body ended after %d of %d bytes: %w", n, len(p), short(err))
	}
	if !exact {
		return nil
	}
	// This also lets the connection go back to the pool.
	switch n, err := body.Read(make([]byte, 1)); {
	case n > 0:
		return fmt.Errorf("the server sent more than the %d bytes it was asked for", len(p))
	case err != nil && err != io.EOF:
		return err
	}
	return nil
}

// short names the end of a body that came too early.
func short(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseContentRange parses "bytes first-last/size" (RFC 9110, 14.4). A size of
// "*" gives -1.
func parseContentRange(v string) (first, last, size int64, err error) {
	bad := fmt.Errorf("the server answered a range with content range %.100q", v)
	rest, ok := strings.CutPrefix(v, "bytes ")
	span, total, ok2 := strings.Cut(rest, "/")
	from, to, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, -1, bad
	}
	first, err1 := strconv.ParseInt(from, 10, 64)
	last, err2 := strconv.ParseInt(to, 10, 64)
	size = -1
	var err3 error
	if total != "*" {
		size, err3 = strconv.ParseInt(total, 10, 64)
	}
	if err1 != nil || err2 != nil || err3 != nil || first < 0 || last < first || total != "*" && size <= last {
		return 0, 0, -1, bad
	}
	return first, last, size, nil
}
