package oss

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/aliyun/alibabacloud-oss-go-sdk-v2/oss"
	"github.com/aliyun/alibabacloud-oss-go-sdk-v2/oss/credentials"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/object"
)

// Options say where the bucket is. Endpoint and Bucket are needed.
type Options struct {
	// Endpoint is the host or host:port of a region: the bucket's name comes before
	// it, or into the path if it is an IP address.
	Endpoint string
	// Scheme is http or https. "": https.
	Scheme string
	// Region is the bucket's. "": as the endpoint's name says, if it does.
	Region string
	Bucket string
	// Prefix and the hex digits of a blob's digest are its key.
	Prefix string
	// AccessKeyID and AccessKeySecret are the login, SecurityToken comes with a
	// temporary one. Without keys, reads are anonymous.
	AccessKeyID, AccessKeySecret, SecurityToken string
	// HTTP is how connections are made.
	HTTP backend.HTTPOptions
	// Stall is how long a request may go without progress (less than 4 KiB, or no
	// answer) before it is given up. 0: 30 s.
	Stall time.Duration
}

// A Store is a [backend.Store] over a bucket. It keeps connections between calls and is
// safe for concurrent use.
type Store struct {
	objects object.Store
	http    *object.Client
	oss     *oss.Client
	base    *url.URL
	bucket  string
	clock   *clock // nil: reads are anonymous
}

// New returns a store. It makes no request.
func New(o Options) (*Store, error) {
	s, err := newStore(o)
	if err != nil {
		return nil, fmt.Errorf("prepare OSS client: %w", err)
	}
	return s, nil
}

func newStore(o Options) (*Store, error) {
	if !oss.IsValidBucketName(&o.Bucket) {
		return nil, fmt.Errorf("bucket name %q: it has 3 to 63 of a-z, 0-9 and -", o.Bucket)
	}
	base, err := object.Base(o.Scheme, o.Endpoint)
	if err != nil {
		return nil, err
	}
	if o.Region == "" {
		o.Region = regionOf(base.Hostname())
	} else if !isRegion(o.Region) {
		return nil, fmt.Errorf("region %q: write one such as cn-hangzhou", o.Region)
	}
	login, err := newLogin(o)
	if err != nil {
		return nil, err
	}
	client, err := object.NewClient(o.HTTP)
	if err != nil {
		return nil, err
	}
	s := &Store{http: client, base: base, bucket: o.Bucket}
	conf := oss.NewConfig().WithEndpoint(base.String()).WithCredentialsProvider(login).WithRetryMaxAttempts(1) // backend.Retry does that
	conf.HttpClient = client
	s.oss = oss.NewClient(conf, func(so *oss.Options) {
		so.Region = o.Region
		if o.AccessKeyID != "" {
			s.clock = newClock(o.Region)
			so.Signer = s.clock
		}
	})
	s.objects = object.Store{Get: s.get, Prefix: o.Prefix, Stall: o.Stall}
	return s, nil
}

func newLogin(o Options) (credentials.CredentialsProvider, error) {
	switch {
	case (o.AccessKeyID == "") != (o.AccessKeySecret == ""):
		return nil, errors.New("access key id and access key secret go together, and one of them is missing")
	case o.AccessKeyID == "" && o.SecurityToken != "":
		return nil, errors.New("there is a security token without access key id and secret")
	case o.AccessKeyID == "":
		return credentials.NewAnonymousCredentialsProvider(), nil
	}
	return credentials.NewStaticCredentialsProvider(o.AccessKeyID, o.AccessKeySecret, o.SecurityToken), nil
}

// regionOf returns the region that an endpoint's name has, "" when it has none:
// oss-<region>[-internal].aliyuncs.com or <region>.oss.aliyuncs.com.
func regionOf(host string) string {
	name, ok := strings.CutSuffix(strings.ToLower(host), ".aliyuncs.com")
	if !ok {
		return ""
	}
	region, ok := strings.CutPrefix(name, "oss-")
	if ok {
		region = strings.TrimSuffix(region, "-internal")
	} else if region, ok = strings.CutSuffix(name, ".oss"); !ok {
		return ""
	}
	if strings.HasPrefix(region, "accelerate") || !isRegion(region) {
		return ""
	}
	return region
}

func isRegion(s string) bool {
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= 63
}

// Open returns the blob of ref. With ref.Size it makes no request: a missing or
// forbidden blob or one of another size shows at the first read. Without, it asks
// for the first byte to learn the size.
func (s *Store) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	return s.objects.Open(ctx, ref)
}

// Close closes idle connections. The store stays usable.
func (s *Store) Close() error { return s.http.Close() }

// get sends one request, and a second one when the first told what the time is.
func (s *Store) get(ctx context.Context, key string, header http.Header) (*http.Response, error) {
	resp, err := s.getOnce(ctx, key, header)
	refused, ok := errors.AsType[*refusal](err)
	if !ok || s.clock == nil || refused.Reason != "RequestTimeTooSkewed" {
		return resp, err
	}
	ahead, ok := s.clock.set(refused.date)
	if !ok {
		return nil, fmt.Errorf("%w; the server's clock and this machine's differ", err)
	}
	if resp, err = s.getOnce(ctx, key, header); err != nil {
		err = fmt.Errorf("%w; the server's clock is ahead of this machine's by %v", err, ahead.Round(time.Second))
	}
	return resp, err
}

func (s *Store) getOnce(ctx context.Context, key string, header http.Header) (*http.Response, error) {
	in := &oss.OperationInput{
		OpName: "GetObject", Method: http.MethodGet, Bucket: &s.bucket, Key: &key,
		// Else a range that reaches past the end gets the whole object.
		Headers: map[string]string{"x-oss-range-behavior": "standard"},
	}
	for k := range header {
		in.Headers[k] = header.Get(k)
	}
	asked := &http.Request{URL: s.base.JoinPath(s.bucket, key)}
	out, err := s.oss.InvokeOperation(ctx, in)
	if err != nil {
		return nil, translate(err, asked)
	}
	resp := &http.Response{StatusCode: out.StatusCode, Header: out.Headers, Body: out.Body, ContentLength: -1, Request: asked}
	if n, err := strconv.ParseInt(out.Headers.Get("Content-Length"), 10, 64); err == nil {
		resp.ContentLength = n
	}
	return resp, nil
}

// A refusal is an error answer of the server, and the time it had then.
type refusal struct {
	*backend.StatusError
	date string
}

func (r *refusal) Unwrap() error { return r.StatusError }

// translate turns an error of the client into ours, without what the server said in
// words: it may echo what was signed.
func translate(err error, asked *http.Request) error {
	e, ok := errors.AsType[*oss.ServiceError](err)
	if !ok {
		return err
	}
	code := e.Code
	if code == "BadErrorResponse" {
		code = "" // the client's own word for an answer without one
	}
	status := object.Refusal(&http.Response{StatusCode: e.StatusCode, Header: e.Headers, Request: asked}, code)
	if status.Code/100 == 3 {
		return fmt.Errorf("%w; redirects are not followed: give the endpoint of the bucket's region", status)
	}
	return &refusal{status, e.Headers.Get("Date")}
}
