package keychain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// kubeAPI is as much of a client of Kubernetes's API as secrets need. A program with
// client-go's informer is 24 MB larger.
type kubeAPI struct {
	base   *url.URL
	client *http.Client
	token  func() (string, error) // nil: none
}

const (
	kubeDialTime = 10 * time.Second
	kubeIdle     = time.Minute
	kubePage     = 50       // secrets in an answer; each is at most 1 MiB
	maxKubeBody  = 64 << 20 // bytes of an answer, or of events until the next watch
	watchTime    = 5 * time.Minute
)

// secretPath is where the secrets of a namespace are; "*": of all.
func secretPath(namespace string) string {
	if namespace == "*" {
		return "/api/v1/secrets"
	}
	return "/api/v1/namespaces/" + url.PathEscape(namespace) + "/secrets"
}

// A secret is what matters of Kubernetes's.
type secret struct {
	Metadata struct {
		Name            string `json:"name"`
		Namespace       string `json:"namespace"`
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Type string            `json:"type"`
	Data map[string][]byte `json:"data"`
}

// secretType is that of secrets with docker's configuration.
const secretType = "kubernetes.io/dockerconfigjson"

// errGone says that what was known is too old to go on from.
var errGone = errors.New("the watch is too far behind")

// list calls each for every secret and returns the version to watch from.
func (k *kubeAPI) list(ctx context.Context, namespace string, each func(secret)) (version string, err error) {
	more := ""
	for {
		query := url.Values{"limit": {fmt.Sprint(kubePage)}}
		if more != "" {
			query.Set("continue", more)
		}
		body, err := k.get(ctx, namespace, query)
		if err != nil {
			return "", err
		}
		var page struct {
			Metadata struct {
				ResourceVersion string `json:"resourceVersion"`
				Continue        string `json:"continue"`
			} `json:"metadata"`
			Items []secret `json:"items"`
		}
		err = json.NewDecoder(body).Decode(&page)
		if cerr := body.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return "", errors.New("list secrets: the answer is no list of secrets")
		}
		for _, s := range page.Items {
			each(s)
		}
		if more = page.Metadata.Continue; more == "" {
			return page.Metadata.ResourceVersion, nil
		}
	}
}

// watch calls each for every event after a version, until the server ends it, and returns
// the version it has come to.
func (k *kubeAPI) watch(ctx context.Context, namespace, version string, each func(kind string, s secret)) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, watchTime+kubeIdle) // the server ends it before
	defer cancel()
	body, err := k.get(ctx, namespace, url.Values{
		"watch": {"1"}, "allowWatchBookmarks": {"true"}, "resourceVersion": {version}, "timeoutSeconds": {fmt.Sprint(int(watchTime.Seconds()))},
	})
	if err != nil {
		return version, err
	}
	defer body.Close()
	for events := json.NewDecoder(body); ; {
		var e struct {
			Type   string          `json:"type"`
			Object json.RawMessage `json:"object"`
		}
		if err := events.Decode(&e); errors.Is(err, io.EOF) {
			return version, nil
		} else if err != nil {
			return version, errors.New("watch secrets: the stream of events ended in the middle")
		}
		if e.Type == "ERROR" {
			return version, errGone
		}
		var s secret
		if json.Unmarshal(e.Object, &s) != nil {
			return version, errors.New("watch secrets: an event has no secret")
		}
		if s.Metadata.ResourceVersion != "" {
			version = s.Metadata.ResourceVersion
		}
		each(e.Type, s)
	}
}

// get asks for secrets. The caller closes the answer.
func (k *kubeAPI) get(ctx context.Context, namespace string, query url.Values) (io.ReadCloser, error) {
	query.Set("fieldSelector", "type="+secretType)
	u := *k.base
	u.Path = strings.TrimSuffix(u.Path, "/") + secretPath(namespace)
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	if k.token != nil {
		token, err := k.token()
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask Kubernetes for secrets: %w", err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return limitedBody{io.LimitReader(resp.Body, maxKubeBody), resp.Body}, nil
	case http.StatusGone:
		err = errGone
	case http.StatusUnauthorized, http.StatusForbidden:
		err = fmt.Errorf("ask Kubernetes for secrets at %s: %s; the account needs get, list and watch of secrets there", u.Path, resp.Status)
	default:
		err = fmt.Errorf("ask Kubernetes for secrets at %s: %s", u.Path, resp.Status)
	}
	return nil, errors.Join(err, resp.Body.Close())
}

type limitedBody struct {
	io.Reader
	io.Closer
}

// newKubeAPI returns a client that follows no redirect: the token is for one server.
func newKubeAPI(base string, transport *http.Transport, token func() (string, error)) (*kubeAPI, error) {
	u, err := url.Parse(base)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.User != nil {
		return nil, errors.New("the server's address is not of the form https://host:port")
	}
	if token != nil && u.Scheme != "https" {
		return nil, errors.New("a token is sent by https only")
	}
	transport.DialContext = (&net.Dialer{Timeout: kubeDialTime}).DialContext
	transport.TLSHandshakeTimeout = kubeDialTime
	transport.ResponseHeaderTimeout = kubeIdle
	transport.IdleConnTimeout = kubeIdle
	transport.Proxy = http.ProxyFromEnvironment
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return &kubeAPI{base: u, client: client, token: token}, nil
}

// tokenFile reads a token anew each time: it is replaced before it expires.
func tokenFile(name string) func() (string, error) {
	return func() (string, error) {
		p, err := os.ReadFile(name)
		if err != nil {
			return "", fmt.Errorf("read the service account's token: %w", err)
		}
		return strings.TrimSpace(string(p)), nil
	}
}
